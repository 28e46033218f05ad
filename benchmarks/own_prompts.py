"""Merges on a few prompts of the user's own: the error of the denoiser on other prompts.

``python benchmarks/own_prompts.py`` prints, for 1, 3, 5 and 10 prompts a concept of the toybox's
sks1 and sks4, ‖merged − LoRA alone‖ / ‖base − LoRA alone‖ of the denoiser's output on held-out
prompts, of each concept: 0 for the LoRA itself, 1 for the base. With contexts and generic rows, as
is the default, and without.
"""

from __future__ import annotations

from dataclasses import replace

from held_out import HeldOut
from outputs import result_file, write
from toybox_world import World

from iteris_core import Calibration, Lora, merge_loras

CONCEPTS = (1, 4)
PROMPTS = (
    "a photo of a {}",
    "a {}",
    "a {} on a white background",
    "a picture of a {}",
    "a {} on a black background",
    "a {} left of a red star on a white background",
    "a photo of a {} on a gray background",
    "a {} on a blue background",
    "a photo of a {} on a green background",
    "a yellow circle left of a {} on a gray background",
)
CALIBRATIONS = {
    "default": Calibration(),
    "without contexts and generic rows": Calibration(contexts=0.0, generic=0.0),
}


def errors(held_out: HeldOut, merged: Lora) -> list[float]:
    found: list[float] = []
    for rows, own, base in zip(held_out.rows, held_out.own, held_out.base, strict=True):
        ours = held_out.outputs(merged, rows).prompt
        found.append(float((ours - own.prompt).norm() / (base.prompt - own.prompt).norm()))
    return found


def main() -> None:
    world = World()
    held_out = HeldOut(world, CONCEPTS, None)
    table: dict[str, dict[str, list[float]]] = {}
    for name, calibration in CALIBRATIONS.items():
        for count in (1, 3, 5, 10):
            concepts = [
                replace(concept, prompts=[p.format(concept.subject) for p in PROMPTS[:count]])
                for concept in world.merged_concepts(CONCEPTS)
            ]
            merged = merge_loras(world.host, concepts, calibration=calibration).lora
            table.setdefault(name, {})[str(count)] = errors(held_out, merged)
            print(name, count, table[name][str(count)], flush=True)
    write(result_file("own_prompts.json"), {"concepts": CONCEPTS, "errors": table})


if __name__ == "__main__":
    main()
