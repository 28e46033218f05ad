"""How many contexts and timesteps: the denoiser's error and pictures, on seen and on new words.

``python benchmarks/contexts.py`` merges four sets of the toybox's own ten on six templates, by
`contexts` and `timesteps`, and writes ``results/contexts.json``. Of each merge and set: the error
of :mod:`held_out`, and the share of attributes and of backgrounds that are right in pictures, three
a prompt; each on backgrounds that the templates have (seen) and on others (new). What is there is
not made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from held_out import HeldOut
from outputs import read, result_file, write
from toybox_world import World

from iteris_core import Calibration, Lora, merge_loras
from toybox.draw import compose
from toybox.evaluate import sample

SETS = ((1, 4, 6, 2), (8, 10, 1, 7), (2, 3, 5, 7, 9), (1, 4, 6, 7, 8, 10))
BACKGROUNDS = {"seen": ("white", "gray", "black"), "new": ("blue", "green", "yellow", "pink")}
ON = "a {{}} on a {} background"
TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}", *map(ON.format, BACKGROUNDS["seen"]))
CALIBRATIONS = {
    "none, and no generic rows": {"contexts": 0.0, "generic": 0.0},
    "none": {"contexts": 0.0},
    **{str(share): {"contexts": share} for share in (0.1, 0.25, 0.5, 0.8)},
    "six timesteps": {"timesteps": 6},
}
"""At four timesteps, unless it says another number."""
EACH, SEED = 3, 7


def pictures(world: World, numbers: tuple[int, ...], kind: str, lora: Lora) -> list[float]:
    """The share of attributes and of backgrounds that the toybox's judge reads as they should be,
    the mean over concepts."""
    rows: list[tuple[float, float]] = []
    with world.changed(lora):
        for concept in (world.concepts[f"sks{number}"] for number in numbers):
            free = [b for b in concept.backgrounds if b in BACKGROUNDS[kind] for _ in range(EACH)]
            prompts = [compose((f"{concept.token} {concept.class_word}",), b) for b in free]
            found = world.judge.read(sample(world.pipeline, prompts, SEED))
            matches = fmean(sum(one.matches(concept.thing)) / 4 for one in found)
            right = fmean(one.background == b for one, b in zip(found, free, strict=True))
            rows.append((matches, right))
    return [round(fmean(values), 3) for values in zip(*rows, strict=True)]


def main() -> None:
    world = World()
    file = result_file("contexts.json")
    found = read(file)
    for numbers in SETS:
        key = ",".join(map(str, numbers))
        held = {
            kind: HeldOut(world, numbers, None, tuple(map(ON.format, backgrounds)))
            for kind, backgrounds in BACKGROUNDS.items()
        }
        for name, values in CALIBRATIONS.items():
            if key in found.setdefault(name, {}):
                continue
            fields: Mapping[str, Any] = {"timesteps": 4, "seed": 0, **values}
            calibration = Calibration(templates=TEMPLATES, **fields)
            concepts = world.merged_concepts(numbers)
            lora = merge_loras(world.host, concepts, calibration=calibration).lora
            found[name][key] = {
                kind: [
                    round(held[kind].errors(lora)["guided"], 3),
                    *pictures(world, numbers, kind, lora),
                ]
                for kind in BACKGROUNDS
            }
            print(name, numbers, found[name][key], flush=True)
            write(file, found)


if __name__ == "__main__":
    main()
