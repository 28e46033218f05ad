"""LoRAs without trigger words beside subjects: ``python benchmarks/wordless.py``.

A look of ``benchmarks/styles`` whose LoRA was trained without words is merged with subjects, and
acts on every prompt. Of pictures on new words, with a subject's trigger and without any: ``style``
is the share that is read as the look's, ``judge`` that of the subject's attributes. Rows: the look
with each subject's LoRA alone (``pair``), both merged (``merged``), the merged subjects with the
look loaded beside them (``outside``), and the merged subjects without it (``subjects``). Writes
``results/wordless_reported.json`` and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

import styles
from conditions import norm
from outputs import asked, once, result_file
from protocol.held_out import merged
from protocol.plan import sets_of
from styles.reader import load as load_reader
from uses import CONDITIONS, Beside, both
from worlds import reported

from iteris_core import Concept, Lora

SETS = {2: 4, 5: 2}
"""How many subjects → sets."""
USES = "plain", "0.8", "1.2", "another at 0.6"
ROWS = "subjects", "pair", "merged", "outside"


class Look:
    """A ``world`` whose pictures are read with the look ``name``."""

    def __init__(self, world: Any, name: str) -> None:
        self.world, self.name = world, name
        self.look = world.host.read_lora(
            styles.ROOT / "weights" / "wordless" / f"{name}.safetensors"
        )
        self._reader = load_reader(styles.ROOT / "weights")

    def merged(self, names: Sequence[str], look: Lora | None) -> Lora:
        concepts = self.world.concepts(names, 0)
        if look is not None:
            concepts.append(Concept(look, None))
        return merged(self.world, concepts)

    def figures(self, lora: Lora, names: Sequence[str]) -> dict[str, float]:
        """``names`` are the subjects that are prompted; none: prompts without a trigger."""
        kind = "new words" if names else "no trigger"
        wanted = self.world.prompted(kind, names, 1)
        seen = self._reader.read(self.world.draw(lora, wanted), [w.scene for w in wanted])
        found = {"style": fmean(one.style == self.name for one in seen)}
        if names:
            things = [self.world.known[w.shown[0]].thing for w in wanted]
            matches = [one.matches(of) for one, of in zip(seen, things, strict=True)]
            found["judge"] = fmean(fmean(some.values()) for some in matches)
        return found

    def row(self, label: str, names: Sequence[str], rest: str) -> dict[str, Any]:
        """Use → figures with a trigger and without one."""
        own = {
            n: c.lora or Lora({}) for n, c in zip(names, self.world.concepts(names), strict=True)
        }
        beside = Beside(self.world.concepts([rest])[0].lora or Lora({}), Lora({}))
        if label == "pair":
            loras = {name: both(lora, self.look, 1.0) for name, lora in own.items()}
        else:
            one = self.merged(names, self.look if label == "merged" else None)
            loras = dict.fromkeys(names, both(one, self.look, 1.0) if label == "outside" else one)
        found: dict[str, Any] = {
            "norm": norm(loras[names[0]]) / math.hypot(*map(norm, own.values()))
        }
        for use in USES:
            used = {n: CONDITIONS[use].of(lora, beside) for n, lora in loras.items()}
            some = [self.figures(lora, [name]) for name, lora in used.items()]
            found[use] = {key: fmean(one[key] for one in some) for key in some[0]}
            found[use]["no trigger"] = self.figures(used[names[0]], [])["style"]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    until = asked(parser).until
    path, look = result_file("wordless_reported.json"), Look(reported(), "frame")
    subjects = sorted(look.world.subjects)
    for size, count in SETS.items():
        for names in sets_of(subjects, size, 0)[:count]:
            rest = next(name for name in subjects if name not in names)
            for label in ROWS:
                key = json.dumps([look.name, label, *names])
                once(path, key, until, partial(look.row, label, names, rest))


if __name__ == "__main__":
    main()
