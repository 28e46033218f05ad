"""A slider beside subjects, at either sign: ``python benchmarks/slider.py [--world toybox]``.

The slider of ``benchmarks/styles`` makes things larger, or smaller at a negative strength. Of
pictures on new words under it at each of :data:`STRENGTHS`: ``size``, the share of the picture that
is not background; ``judge``, the share of the subject's attributes; ``no trigger``, the size
without one. Rows: the slider with each subject's LoRA alone (``pair``), in one merge with the
subjects at that strength (``included``), and loaded beside a merge of the subjects that was made
with it ``outside``, or without it (``unknown``). Writes ``results/slider_WORLD.json`` and goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean
from typing import Any

import numpy as np
import styles
from outputs import read, result_file, rounded, write
from PIL import Image
from protocol.plan import sets_of
from protocol.toybox import ToyboxWorld
from protocol.world import Wanted
from uses import both
from worlds import WORLDS

from iteris_core import Calibration, Concept, Lora, merge_loras
from toybox.draw import BACKGROUNDS

SETS = {"toybox": {2: 3, 5: 1}, "reported": {2: 3, 5: 1}}
"""World → how many subjects → sets."""
STRENGTHS = -1.0, 0.5, 1.0
ROWS = "pair", "included", "outside", "unknown"
_AWAY = 60.0
"""How far, in levels of 255, a pixel of a thing lies from the background's colour at least."""


def size(pictures: Sequence[Image.Image], wanted: Sequence[Wanted]) -> float:
    shares: list[float] = []
    for picture, one in zip(pictures, wanted, strict=True):
        values = np.asarray(picture.convert("RGB"), dtype=float)
        away = np.linalg.norm(values - BACKGROUNDS[one.scene], axis=-1)
        shares.append(float((away > _AWAY).mean()))
    return fmean(shares)


class Slider:
    def __init__(self, world: ToyboxWorld) -> None:
        self.world = world
        self.slider = world.host.read_lora(styles.slider().lora)

    def merged(self, names: Sequence[str], **slider: Any) -> Lora:
        concepts = self.world.concepts(names, 0)
        if slider:
            concepts.append(Concept(self.slider, None, **slider))
        calibration = Calibration.from_mapping({**self.world.half, "seed": 0})
        return merge_loras(self.world.host, concepts, calibration=calibration).lora

    def figures(self, lora: Lora, name: str) -> dict[str, float]:
        wanted = self.world.prompted("new words", [name], 1)
        plain = self.world.prompted("no trigger", [], 1)
        pictures = self.world.draw(lora, wanted)
        return {
            "size": size(pictures, wanted),
            "judge": fmean(one["judge"] for one in self.world.read(pictures, wanted)),
            "no trigger": size(self.world.draw(lora, plain), plain),
        }

    def row(self, label: str, names: Sequence[str]) -> dict[str, Any]:
        """Strength → figures; 0: without the slider."""
        own = dict(zip(names, self.world.concepts(names), strict=True))
        made: Callable[..., Lora] = cache(lambda **slider: self.merged(names, **slider))

        def used(name: str, strength: float) -> Lora:
            if label == "pair":
                return both(own[name].lora or Lora({}), self.slider, strength)
            if label == "included":
                return made(strength=strength) if strength else made()
            beside = {"always_on": "outside"} if label == "outside" else {}
            return both(made(**beside), self.slider, strength)

        found: dict[str, Any] = {}
        for strength in (0.0, *STRENGTHS):
            some = [self.figures(used(name, strength), name) for name in names]
            found[f"at {strength:g}"] = {key: fmean(one[key] for one in some) for key in some[0]}
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=sorted(SETS), default="toybox")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after")
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    world: Any = WORLDS[given.world]()
    path, slider = result_file(f"slider_{given.world}.json"), Slider(world)
    for size, count in SETS[given.world].items():
        for names in sets_of(sorted(world.subjects), size, 0)[:count]:
            for label in given.rows.split(","):
                key = json.dumps(["size", label, *names])
                if key in read(path).get("runs", {}):
                    continue
                if time.monotonic() > until:
                    raise SystemExit("stopped by --seconds; the next run goes on")
                found = rounded(slider.row(label, names))
                write(path, {"runs": {**read(path).get("runs", {}), key: found}})
                print(key, found, flush=True)


if __name__ == "__main__":
    main()
