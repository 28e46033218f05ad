"""LoRAs at a lower rank: ``python benchmarks/resize.py`` on the toybox's own concepts.

Writes ``benchmarks/results/resize.json`` case by case; existing cases are not measured again. Each
of five LoRAs of rank 8 is reduced to the size of rank 4 and 2, and a merge of all five to that of
rank 8, 4 and 2. ``error`` is that of the guided denoiser output on prompts from templates to which
nothing was fitted, ‖f_small − f_whole‖ / ‖f_base − f_whole‖; ``likeness`` is that of pictures to
the references, on backgrounds that no fitted prompt had. Ways: ``svd`` cuts each layer's weights at
one rank, as kohya's ``resize_lora.py`` does with a fixed rank; ``weights`` is ours without a base,
and ``base`` ours with one. ``ratio`` in the summary is the mean error over that of ``svd``.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from held_out import HELD_OUT, HeldOut, relative
from outputs import QUICK, add, read, result_file, write
from protocol.toybox import ToyboxWorld

from iteris_core import Calibration, Concept, Lora, merge_loras
from iteris_core.edit.resize import resize_lora
from iteris_core.linalg import truncate_factors
from iteris_core.solve.ranks import Target

FILE = result_file("resize.json")
NAMES = ("sks1", "sks2") if QUICK else ("sks1", "sks2", "sks3", "sks4", "sks5")
WAYS = ("svd", "weights", "base")
LATENTS = 8
CHOSEN_ON = ("sks1", "sks2")
"""LoRAs on which the weighting was chosen, and which the summary leaves out; the merge of all five
was looked at, too."""


class Bench:
    def __init__(self) -> None:
        self.world = ToyboxWorld()
        self.calibration = {**self.world.half, "latent_size": LATENTS}
        self.new = [text for text in HELD_OUT if text not in self.world.half["templates"]]
        if QUICK:
            self.calibration |= {"samples": 4, "timesteps": 1, "latents": "noise"}

    def concept(self, names: Sequence[str]) -> Concept:
        """The LoRA to resize, and its trigger words."""
        every = self.world.concepts(names)
        if len(every) == 1:
            return every[0]
        merged = merge_loras(self.world.host, every, calibration=self.calibration)
        subjects = [phrase for concept in every for phrase in concept.phrases]
        return Concept(merged.lora, subjects=subjects)

    def run(self) -> None:
        singles = {name: ([name], (4, 2)) for name in NAMES}
        for name, (names, ranks) in {**singles, "merge": (NAMES, (8, 4, 2))}.items():
            wanted = [f"{name} {rank} {way}" for rank in ranks for way in WAYS]
            wanted = [key for key in [*wanted, f"{name} whole"] if key not in read(FILE)]
            if not wanted:
                continue
            concept = self.concept(names)
            held_out = HeldOut(self.world, names, LATENTS, self.new)
            for key in wanted:
                small = concept.lora if key.endswith(" whole") else self.small(concept, key)
                add(FILE, key, self.measured(small, concept.lora, held_out, names))
                print(key, read(FILE)[key], flush=True)

    def small(self, concept: Concept, key: str) -> Lora:
        _, rank, way = key.split()
        if way == "svd":
            sites = {s: truncate_factors(c, int(rank))[0] for s, c in concept.lora.sites.items()}
            return Lora(sites, base=concept.lora.base)
        host = self.world.host if way == "base" else None
        calibration = Calibration.from_mapping(self.calibration)
        return resize_lora(concept, Target(int(rank)), host, calibration=calibration).lora

    def measured(
        self, small: Lora, whole: Lora, held_out: HeldOut, names: Sequence[str]
    ) -> dict[str, float]:
        errors = [
            relative(held_out.guided(small, rows), held_out.guided(whole, rows), base)
            for rows, base in zip(held_out.rows, held_out.base, strict=True)
        ]
        likeness = self.world.mean_likeness(small, self.world.prompted("new words", names, 1))
        return {
            "error": round(fmean(errors), 4),
            "likeness": round(likeness, 4),
            "numbers": sum(c.up.numel() + c.down.numel() for c in small.sites.values()),
        }


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """By rank and way: the mean error over that of ``svd``, and the likeness; of single LoRAs
    without :data:`CHOSEN_ON`."""
    rows: dict[str, Any] = {}
    found = {key: of for key, of in found.items() if key.split()[0] not in CHOSEN_ON}
    for kind in ("sks", "merge"):
        for rank in (8, 4, 2):
            for way in WAYS:
                of = {k: v for k, v in found.items() if k.startswith(kind) and k.endswith(way)}
                own = {k.split()[0]: v for k, v in of.items() if k.split()[1] == str(rank)}
                plain = [found[f"{name} {rank} svd"] for name in own]
                if own:
                    error = fmean(v["error"] for v in own.values())
                    rows[f"{kind} {rank} {way}"] = {
                        "error": round(error, 4),
                        "ratio": round(error / fmean(v["error"] for v in plain), 3),
                        "likeness": round(fmean(v["likeness"] for v in own.values()), 4),
                    }
    return rows


if __name__ == "__main__":
    Bench().run()
    measured = {key: of for key, of in read(FILE).items() if key not in ("summary", "chosen on")}
    write(FILE, {**measured, "chosen on": CHOSEN_ON, "summary": summary(measured)})
    print(read(FILE)["summary"])
