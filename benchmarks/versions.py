"""Several versions of one LoRA in one file: ``python benchmarks/versions.py [--world reported]``.

The versions of a concept are its trainings, which differ in pictures, noise and start. A row is a
merge of all of them under their one trigger; ``single`` is the mean over the versions alone,
``best`` the version that is the likest, of which one cannot know before. Figures are of pictures on
words that no row had. Writes ``results/versions_WORLD.json`` and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

import rivals  # noqa: F401 (registers them)
from conditions import merged
from outputs import asked, once, result_file
from protocol.plan import SINGLE
from worlds import WORLDS

from iteris_core import Lora

METHODS = (SINGLE, "average", "iteris")
FIGURES = ("likeness", "judge", "scene")


def figures(world: Any, lora: Lora | None, name: str) -> dict[str, float]:
    wanted = world.prompted("new words", [name], 1)
    pictures = world.read(world.draw(lora, wanted), wanted)
    return {figure: fmean(p[figure] for p in pictures) for figure in FIGURES}


def measured(world: Any, label: str, name: str) -> dict[str, Any]:
    versions = [world.concepts([name], training)[0] for training in range(world.trained)]
    if label == SINGLE:
        each: Sequence[dict[str, float]] = [figures(world, v.lora, name) for v in versions]
        mean = {figure: fmean(of[figure] for of in each) for figure in FIGURES}
        return {**mean, "best": max(of["likeness"] for of in each),
                "best judge": max(of["judge"] for of in each)}  # fmt: skip
    lora, found = merged(world, versions, label, 0)
    return {**figures(world, lora, name), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=("reported", "minilm"), default="reported")
    parser.add_argument("--methods", default=",".join(METHODS))
    given = asked(parser)
    world: Any = WORLDS[given.world]()
    path = result_file(f"versions_{given.world}.json")
    for name in world.subjects:
        for label in given.methods.split(","):
            key = json.dumps([label, name])
            once(path, key, given.until, partial(measured, world, label, name))


if __name__ == "__main__":
    main()
