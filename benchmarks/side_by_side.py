"""The same prompts and the same noise by every method: ``docs/images/results-methods.png``.

``python benchmarks/side_by_side.py [--numbers 1 4]`` merges one of the reported sets of the
toybox by IterIS and its rivals, with the settings of ``quality.py``, and draws each concept alone
and two of them in one picture. The first picture of each, nothing is chosen by hand.
"""

from __future__ import annotations

import argparse

from outputs import ROOT, result_file
from PIL import Image
from quality import SETS, TUNED
from toybox_world import Picture, World

from iteris_core import Calibration, Lora, merge_loras
from iteris_core.score.sheet import contact_sheet
from toybox import TEMPLATES

METHODS = {
    "iteris": "IterIS",
    "regmean++": "RegMean++",
    "regmean": "RegMean",
    "ssr": "SSR-Merge",
    "average": "average",
    "sum": "all loaded at once",
}
SET = SETS["2"][0]
SIDE = 128


def chosen(world: World, numbers: tuple[int, ...]) -> list[Picture]:
    """The first picture of every concept, and of the first two neighbours."""
    pictures = world.pictures(numbers)
    first: dict[tuple[str, ...], Picture] = {}
    for picture in pictures:
        first.setdefault(picture.concepts, picture)
    alone = [p for shown, p in first.items() if len(shown) == 1]
    return alone + [p for shown, p in first.items() if len(shown) == 2][:1]


def reference(world: World, picture: Picture) -> Image.Image | None:
    """What a concept was learned from; of two in one picture there is nothing."""
    if len(picture.concepts) == 2:
        return None
    return Image.open(world.concepts[picture.concepts[0]].references[0])


def alone(world: World, picture: Picture) -> Image.Image | None:
    """By the concept's own LoRA; of two there is none that knows both."""
    if len(picture.concepts) == 2:
        return None
    return world.draw(world.loras[picture.concepts[0]], [picture])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numbers", type=int, nargs="+", default=list(SET))
    arguments = parser.parse_args()
    numbers, world = tuple(arguments.numbers), World()
    pictures = chosen(world, numbers)
    rows: dict[str, list[Image.Image | None]] = {
        "learned from": [reference(world, picture) for picture in pictures],
        "no LoRA": [*world.draw(None, pictures)],
        "its LoRA alone": [alone(world, picture) for picture in pictures],
    }
    for method, label in METHODS.items():
        rows[label] = [*world.draw(merged(world, numbers, method), pictures)]
        print(label, flush=True)
    sheet = contact_sheet(rows, [p.prompt for p in pictures], cell=SIDE)
    whole = numbers == SET
    path = ROOT / "docs" / "images" / "results-methods.png"
    if not whole:
        path = result_file("results-methods.png", whole=False)
        path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    print(path)


def merged(world: World, numbers: tuple[int, ...], method: str) -> Lora:
    return merge_loras(
        world.host,
        world.merged_concepts(numbers, None, 0.0),
        method,
        settings=TUNED.get(method, {}),
        calibration=Calibration(templates=TEMPLATES),
    ).lora


if __name__ == "__main__":
    main()
