"""LoRAs without trigger words beside subjects: ``python benchmarks/wordless.py [--lora size]``.

``frame`` is a look of ``benchmarks/styles``, ``size`` a slider that makes things larger, at a
negative strength smaller. Of pictures on new words: ``style``, the share read as the look's, or
``size``, the share of the picture that is not background; ``judge``, the share of the subject's
attributes; ``no trigger``, the first without a trigger. Rows:

- ``pair``: the LoRA beside each subject's own.
- ``merged``, of the slider ``included``: all in one merge, the slider at its strength.
- ``outside``, of the slider ``unknown``: beside a merge of the subjects that was made without it.
- ``outside`` of the slider: beside a merge that was made with it on at 1.
- ``subjects``: these merged, and nothing beside.

Writes ``results/wordless_reported.json`` or ``slider_toybox.json`` and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from statistics import fmean
from typing import Any

import numpy as np
import styles
from conditions import norm
from outputs import once, result_file
from PIL import Image
from protocol.plan import sets_of
from protocol.toybox import ToyboxWorld
from protocol.world import Wanted
from styles.reader import load as load_reader
from uses import both, loaded
from worlds import WORLDS

from iteris_core import Calibration, Concept, Lora, merge_loras
from toybox.draw import BACKGROUNDS

SETS = {"frame": {2: 4, 5: 2}, "size": {2: 3, 5: 1}}
"""LoRA → how many subjects → sets."""
ROWS = {
    "frame": ("subjects", "pair", "merged", "outside"),
    "size": ("pair", "included", "outside", "unknown"),
}
USES = {"plain": (1.0, 0.0), "0.8": (0.8, 0.0), "1.2": (1.2, 0.0), "another at 0.6": (1.0, 0.6)}
"""Of the look: the strength of all that is loaded, and of another subject beside it."""
STRENGTHS = 0.0, -1.0, 0.5, 1.0
"""Of the slider."""
_AWAY = 60.0
"""How far, in levels of 255, a pixel of a thing lies from the background's colour at least."""


def size(pictures: Sequence[Image.Image], wanted: Sequence[Wanted]) -> float:
    shares: list[float] = []
    for picture, one in zip(pictures, wanted, strict=True):
        values = np.asarray(picture.convert("RGB"), dtype=float)
        away = np.linalg.norm(values - BACKGROUNDS[one.scene], axis=-1)
        shares.append(float((away > _AWAY).mean()))
    return fmean(shares)


class Wordless:
    """A LoRA without words, on a ``world`` of subjects."""

    def __init__(self, world: ToyboxWorld, name: str) -> None:
        self.world, self.name = world, name
        self.lora = world.host.read_lora(styles.WORDLESS / f"{name}.safetensors")
        self._reader = load_reader(styles.ROOT / "weights")

    def merged(self, names: Sequence[str], **ours: Any) -> Lora:
        """With this LoRA under the options of its concept, if there are any."""
        concepts = self.world.concepts(names, 0)
        if ours:
            concepts.append(Concept(self.lora, None, **ours))
        calibration = Calibration.from_mapping({**self.world.half, "seed": 0})
        return merge_loras(self.world.host, concepts, calibration=calibration).lora

    def figures(self, lora: Lora, names: Sequence[str]) -> dict[str, float]:
        """``names`` are the subjects that are prompted; none: prompts without a trigger."""
        wanted = self.world.prompted("new words" if names else "no trigger", names, 1)
        pictures = self.world.draw(lora, wanted)
        if self.name == "size":
            found = {"size": size(pictures, wanted)}
            if names:
                found["judge"] = fmean(one["judge"] for one in self.world.read(pictures, wanted))
            return found
        seen = self._reader.read(pictures, [w.scene for w in wanted])
        found = {"style": fmean(one.style == self.name for one in seen)}
        if names:
            things = [self.world.known[w.shown[0]].thing for w in wanted]
            matches = [one.matches(of) for one, of in zip(seen, things, strict=True)]
            found["judge"] = fmean(fmean(some.values()) for some in matches)
        return found

    def row(self, label: str, names: Sequence[str], rest: str) -> dict[str, Any]:
        """Use → figures with a trigger and without one."""
        own = {n: self.world.concepts([n])[0].lora or Lora({}) for n in names}
        made: Callable[..., Lora] = cache(lambda **ours: self.merged(names, **ours))

        def used(name: str, strength: float) -> Lora:
            if label == "pair":
                return both(own[name], self.lora, strength)
            if label in ("subjects", "merged", "included"):
                return made() if label == "subjects" or not strength else made(strength=strength)
            on = {"always_on": "outside"} if (label, self.name) == ("outside", "size") else {}
            return both(made(**on), self.lora, strength)

        found: dict[str, Any] = {}
        if self.name == "size":
            for strength in STRENGTHS:
                loras = {name: used(name, strength) for name in names}
                found[f"at {strength:g}"] = self._means(loras, each=True)
            return found
        plain = {name: used(name, 1.0) for name in names}
        found["norm"] = norm(plain[names[0]]) / math.hypot(*map(norm, own.values()))
        other = self.world.concepts([rest])[0].lora or Lora({})
        for use, (strength, more) in USES.items():
            loras = {name: loaded(lora, strength, strength) for name, lora in plain.items()}
            if more:
                loras = {name: both(lora, other, more) for name, lora in loras.items()}
            found[use] = self._means(loras, each=False)
        return found

    def _means(self, loras: Mapping[str, Lora], *, each: bool) -> dict[str, float]:
        """Over subjects; without a trigger of ``each`` one's LoRA, or of the first."""
        some = [self.figures(lora, [name]) for name, lora in loras.items()]
        first, *more = loras.values()
        plain = [self.figures(lora, [])[next(iter(some[0]))]
                 for lora in (first, *(more if each else ()))]  # fmt: skip
        return {key: fmean(one[key] for one in some) for key in some[0]} | {
            "no trigger": fmean(plain)
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lora", choices=tuple(ROWS), default="frame")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after")
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    of_look = given.lora == "frame"
    path = result_file("wordless_reported.json" if of_look else "slider_toybox.json")
    world: Any = WORLDS["reported" if of_look else "toybox"]()
    wordless = Wordless(world, given.lora)
    for count, sets in SETS[given.lora].items():
        for names in sets_of(sorted(world.subjects), count, 0)[:sets]:
            rest = next(name for name in sorted(world.subjects) if name not in names)
            for label in ROWS[given.lora]:
                key = json.dumps([given.lora, label, *names])
                once(path, key, until, partial(wordless.row, label, names, rest))


if __name__ == "__main__":
    main()
