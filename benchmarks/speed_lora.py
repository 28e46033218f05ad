"""Four steps with one file: concepts and a speed LoRA in one merge, on new words.

``python benchmarks/speed_lora.py`` writes ``results/speed_lora_reported.json`` of the reported ten,
with a LoRA that was distilled at commit 2d391296; ``--world toybox`` the toybox's own ten, on which
choices are made, into ``build/quick``. All pictures have four steps and no guidance. *Kept* is
relative to each LoRA beside the speed LoRA, above the speed LoRA on the base.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from outputs import ROOT, result_file, rounded, write
from protocol.drawing import draw
from protocol.figures import figures, row
from protocol.held_out import merged as merge
from protocol.plan import sets_of
from worlds import WORLDS

from iteris_core import Concept, Lora
from iteris_core.passes.changes import beside, changes_always

FILE = ROOT / "benchmarks" / "distilled" / "four_steps.safetensors"
STEPS = 4
SIZES = (2, 5)
KIND = "new words"
OURS = "always on, in the file"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=("reported", "toybox"), default="reported")
    asked = parser.parse_args()
    trial = Trial(WORLDS[asked.world]())
    found: dict[str, Any] = {}
    path = result_file(f"speed_lora_{asked.world}.json", whole=asked.world == "reported")
    for size in SIZES:
        rows: dict[str, Any] = {}
        for names in sets_of(trial.world.subjects, size, 0):
            for label, figures_of in trial.set(names).items():
                rows.setdefault(label, {})[0, names] = figures_of
        found[str(size)] = rounded(figures(rows, OURS))
        for label, of in found[str(size)]["rows"].items():
            print(size, label, {name: one["mean"] for name, one in of[KIND].items()}, flush=True)
        write(path, {"steps": STEPS, "sizes": found})


class Trial:
    def __init__(self, world: Any) -> None:
        self.world = world
        self.speed = Concept(world.host.read_lora(FILE), trigger="speed", always_on="include")
        self._alone: dict[str, list[Any]] = {}

    def set(self, names: tuple[str, ...]) -> Mapping[str, Any]:
        """label → figures of one set."""
        concepts = self.world.concepts(names, 0)
        plain = self.merged(concepts, {})
        few = {"denoising_steps": STEPS, "timesteps": STEPS}
        entries = {
            "each LoRA beside the speed LoRA": self.alone(names),
            "the speed LoRA": self.read(self.speed_alone(), names),
            OURS: self.read(self.merged([*concepts, self.speed], few), names),
            "merged without it, beside it": self.read(self.with_speed(plain), names),
            "merged without it, without it": self.read(plain, names),
        }
        own, base = list(entries.values())[:2]
        return {label: row(entry, own, base, [KIND]) for label, entry in entries.items()}

    def alone(self, names: tuple[str, ...]) -> Mapping[str, Any]:
        for name in names:
            if name not in self._alone:
                lora = self.world.concepts([name], 0)[0].lora
                self._alone[name] = self.read(self.with_speed(lora), (name,))[KIND]
        return {KIND: [one for name in names for one in self._alone[name]]}

    def merged(self, concepts: list[Concept], calibration: Mapping[str, Any]) -> Lora:
        return merge(self.world, concepts, calibration=calibration)

    def speed_alone(self) -> Lora:
        return Lora(changes_always([self.speed]))

    def with_speed(self, lora: Lora | None) -> Lora:
        return Lora(beside(lora.sites if lora else {}, changes_always([self.speed])))

    def read(self, lora: Lora, names: tuple[str, ...]) -> Mapping[str, Any]:
        """Figures of images of each of ``names``, drawn in four steps without guidance."""
        world = self.world
        wanted = world.prompted(KIND, names, 1)
        images = draw(
            world.pipeline, world.host, lora, wanted,
            num_inference_steps=STEPS, guidance_scale=1.0,
        )  # fmt: skip
        read = world.read(images, wanted)
        return {KIND: [[w.shown[0], one] for w, one in zip(wanted, read, strict=True)]}


if __name__ == "__main__":
    main()
