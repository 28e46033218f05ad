"""How many contexts: the denoiser's error on calibration prompts and on new words, by `contexts`.

``python benchmarks/contexts.py`` merges three sets of the toybox's own ten on six templates and
writes ``results/contexts.json``: for each calibration and each set, the error of
:mod:`held_out` on backgrounds that the templates have (seen) and on others (new).
"""

from __future__ import annotations

from itertools import product

import held_out
from held_out import HeldOut
from outputs import result_file, write
from toybox_world import World

from iteris_core import Calibration, merge_loras

SETS = ((1, 4, 6, 2), (8, 10, 1, 7), (2, 3, 5, 7, 9))
SEEN = ("white", "gray", "black")
NEW = ("blue", "green", "yellow", "pink")
ON = "a {{}} on a {} background"
TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}", *map(ON.format, SEEN))
CALIBRATIONS = {
    "none, and no generic rows": {"contexts": 0.0, "generic": 0.0},
    "none": {"contexts": 0.0},
    **{str(share): {"contexts": share} for share in (0.1, 0.25, 0.5, 0.8)},
    "0.25, generic rows of weight 1": {"contexts": 0.25, "generic": 1.0},
    "0.5, 100 samples": {"contexts": 0.5, "samples": 100},
}


def rows(world: World, numbers: tuple[int, ...], backgrounds: tuple[str, ...]) -> HeldOut:
    held_out.HELD_OUT = tuple(map(ON.format, backgrounds))
    return HeldOut(world, numbers, None)


def main() -> None:
    world = World()
    known = {numbers: [rows(world, numbers, of) for of in (SEEN, NEW)] for numbers in SETS}
    found: dict[str, dict[str, list[float]]] = {}
    for (name, values), numbers in product(CALIBRATIONS.items(), SETS):
        calibration = Calibration(templates=TEMPLATES, seed=0, **values)
        concepts = world.merged_concepts(numbers, None, 0.0)
        lora = merge_loras(world.host, concepts, calibration=calibration).lora
        errors = [round(held.errors(lora)["guided"], 3) for held in known[numbers]]
        found.setdefault(name, {})[",".join(map(str, numbers))] = errors
        print(name, numbers, errors, flush=True)
        write(result_file("contexts.json"), found)


if __name__ == "__main__":
    main()
