"""The ten concepts that the toybox's tables report, chosen once by a rule before any was trained.

``python benchmarks/reported_concepts.py`` writes ``benchmarks/reported/world.json``; training them:
``python -m toybox.train --step loras --world benchmarks/reported --work build/reported``, with
``--again 1`` and ``--again 2`` for two further LoRAs of each. The base's own ten rare tokens stand
for them, since another word would come in pieces.

The rule: the classes of the toybox's ten in their order; for each, from one random generator, a
pattern of those that its shape carries, save the rim, which the base draws poorly (the toybox's
README says so), and two colours; drawn again while any concept of the toybox or of this list has
the same class and the same two colours. Alphas and layouts take turns so that all four of their
combinations occur; 600 steps for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import toybox
from toybox.draw import COLORS, patterns_of

ROOT = Path(__file__).parent / "reported"
SEED = 2026
FIRST_NUMBER = 100
"""From which the concepts are counted: pictures and training have other seeds than the toybox's."""


def chosen(
    words: Sequence[str], seed: int, known: Iterable[toybox.Concept]
) -> list[dict[str, Any]]:
    """The entries of world.json, a class for each of the base's rare tokens; ``known`` are the
    concepts that none of them may be like."""
    rng = np.random.default_rng(seed)
    taken = {(c.class_word, frozenset((c.color1, c.color2))) for c in known}
    entries: list[dict[str, Any]] = []
    for index, (token, word) in enumerate(zip(toybox.concepts(), words, strict=True)):
        patterns = [p for p in patterns_of(word) if p != "rim"]
        while True:
            pattern = str(rng.choice(patterns))
            first, second = (str(c) for c in rng.choice(list(COLORS), 2, replace=False))
            key = word, frozenset((first, second))
            if key not in taken:
                break
        taken.add(key)
        entries.append(
            {
                "token": token,
                "class_word": word,
                "pattern": pattern,
                "color1": first,
                "color2": second,
                "steps": 600,
                "alpha": (4, 16)[index % 2],
                "layout": ("kohya", "diffusers")[index // 2 % 2],
            }
        )
    return entries


def write_world(root: Path, first_number: int, entries: Sequence[Mapping[str, Any]]) -> None:
    """``first_number`` is that from which the concepts are counted: pictures and training have
    seeds by it."""
    lines = ",\n    ".join(json.dumps(entry) for entry in entries)
    root.mkdir(exist_ok=True)
    (root / "world.json").write_text(
        f'{{\n  "first_number": {first_number},\n  "concepts": [\n    {lines}\n  ]\n}}\n'
    )


def reported() -> list[dict[str, Any]]:
    own = toybox.concepts()
    known = [*own.values(), *toybox.pivotal_concepts().values()]
    return chosen([concept.class_word for concept in own.values()], SEED, known)


if __name__ == "__main__":
    write_world(ROOT, FIRST_NUMBER, reported())
