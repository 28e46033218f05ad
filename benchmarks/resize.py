"""LoRAs at a lower rank: ``python benchmarks/resize.py`` on the toybox's own concepts.

Writes ``benchmarks/results/resize.json`` case by case; existing cases are not measured again. Each
of five LoRAs of rank 8 is reduced to the size of rank 4 and 2, and a merge of all five to that of
rank 8, 4 and 2. ``error`` is that of the guided denoiser output on prompts from templates to which
nothing was fitted, ‖f_small − f_whole‖ / ‖f_base − f_whole‖; ``likeness`` is that of pictures to
the references, on backgrounds that no fitted prompt had. Ways: ``svd`` cuts each layer's weights at
one rank, as kohya's ``resize_lora.py`` does with a fixed rank; ``weights`` is ours without a base,
and ``base`` ours with one. The weighting was chosen on sks1 and sks2, which the table leaves out;
the merge of all five was looked at, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from outputs import add, read, result_file
from protocol.new_rows import NewRows, relative
from protocol.toybox import ToyboxWorld

from iteris_core import Calibration, Concept, Lora, merge_loras
from iteris_core.edit.resize import resize_lora
from iteris_core.edit.target import Target
from iteris_core.linalg import truncate_factors
from toybox import TEMPLATES

FILE = result_file("resize.json")
NAMES = ("sks1", "sks2", "sks3", "sks4", "sks5")
WAYS = ("svd", "weights", "base")
LATENTS = 8
_SEED = 1000


class Bench:
    def __init__(self) -> None:
        self.world = ToyboxWorld()
        self.calibration = {**self.world.half, "latent_size": LATENTS}
        self.new = [text for text in TEMPLATES[5::6] if text not in self.world.half["templates"]]

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
            rows = NewRows(
                self.world.host,
                self.world.concepts(names),
                _SEED,
                samples=16,
                latent_size=LATENTS,
                guidance=self.world.sampling["guidance_scale"],
                templates=self.new,
            )
            for key in wanted:
                small = concept.lora if key.endswith(" whole") else self.small(concept, key)
                add(FILE, key, self.measured(small, concept.lora, rows, names))
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
        self, small: Lora, whole: Lora, rows: NewRows, names: Sequence[str]
    ) -> dict[str, float]:
        guidance = self.world.sampling["guidance_scale"]
        errors: list[float] = []
        for of in rows.of:
            outputs = (rows.outputs(s, of, guidance) for s in (small.sites, whole.sites, {}))
            errors.append(relative(*outputs))
        wanted = self.world.prompted("new words", names, 1)
        read = self.world.read(self.world.draw(small, wanted), wanted)
        return {
            "error": round(fmean(errors), 4),
            "likeness": round(fmean(one["likeness"] for one in read), 4),
            "numbers": sum(c.up.numel() + c.down.numel() for c in small.sites.values()),
        }


if __name__ == "__main__":
    Bench().run()
