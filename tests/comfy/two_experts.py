"""Measurements on a model with two experts, as on any other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from figures import LONG, Trial
from reduced_models import Reduced
from torch import Tensor

BOUNDARY = 0.9
STEPS = 4


class Experts(Trial):
    """The MODEL for high noise, the CLIP, and the MODEL for low noise, with LoRAs for each; those
    for high noise change the text encoder too."""

    def __init__(self, pack: ModuleType, reduced: Reduced, folder: Path) -> None:
        super().__init__(pack, reduced, folder)
        self.low, _ = reduced.make()
        with torch.inference_mode():
            for weight in self.low.model.diffusion_model.parameters():
                weight.mul_(0.9)
        self.low_paths = [self.write_lora(seed, "diffusion_model.") for seed in (3, 4)]
        self.calibration = dataclasses.replace(self.calibration, denoising_steps=STEPS)

    @property
    def base(self) -> tuple[Any, ...]:
        return self.model, self.clip, self.low

    def options(self) -> dict[str, Any]:
        return {**super().options(), "low": self.low, "boundary": BOUNDARY}

    def concepts(self, count: int) -> list[Any]:
        pairs = zip(super().concepts(count), self.low_paths, strict=False)
        return [spec.model_copy(update={"low": path}) for spec, path in pairs]

    def files(self, number: int) -> tuple[Path, ...]:
        return self.paths[number], self.low_paths[number]

    def node(self, result: Any) -> tuple[Any, ...]:
        high, low = self.merging.as_lora_models(result, "float32")
        model, clip = self.lora.apply_lora(self.model, self.clip, high)
        return model, clip, self.lora.apply_lora(self.low, self.clip, low)[0]

    def save(self, result: Any) -> tuple[Path, ...]:
        high, low = self.merging.as_lora_models(result, "float32")
        return self.saved(high, "merged_high"), self.saved(low, "merged_low")

    def stock(self, *files: Path) -> tuple[Any, ...]:
        return *self.loaded(self.model, files[0]), self.loaded(self.low, files[1])[0]

    def draw(self, model: Any, clip: Any, low: Any) -> Tensor:
        """As two nodes KSampler (Advanced) do it, one after the other."""
        import comfy.sample

        options = {"steps": STEPS, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple"}
        with torch.inference_mode():
            noise, empty = self.latents()
            texts = {"positive": self.text(clip, LONG), "negative": self.text(clip, "")}
            half = comfy.sample.sample(
                model,
                noise,
                latent_image=empty,
                last_step=2,
                force_full_denoise=False,
                disable_pbar=True,
                **texts,
                **options,
            )
            return comfy.sample.sample(
                low,
                torch.zeros_like(noise),
                latent_image=half,
                start_step=2,
                disable_noise=True,
                force_full_denoise=True,
                disable_pbar=True,
                **texts,
                **options,
            ).clone()
