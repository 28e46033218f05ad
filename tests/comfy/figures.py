"""What is measured on every architecture: a merge of one LoRA, of two, and its file."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from reduced_models import RANK, Reduced
from safetensors.torch import save_file
from torch import Tensor, nn

LONG = "a photo of a sks cat with a red hat on a wooden table beside an open window, " * 8
"""Over 77 tokens of every tokenizer."""
QUOTED = 'a sks cat with a sign that says "cat"'
PROMPTS = ("", "a sks cat", "a sks dog", "a sks hat", QUOTED, LONG)
EYES = ".visual."
"""Layers of a text encoder that only pictures reach."""


class Trial:
    """One architecture's MODEL and CLIP, and two LoRAs of theirs under the names that ComfyUI has
    for every class."""

    def __init__(self, pack: ModuleType, reduced: Reduced, folder: Path) -> None:
        def module(name: str) -> Any:
            return importlib.import_module(f"{pack.__name__}.{name}")

        self.core = module("iteris_core")
        self.merging, self.lora = module("nodes.merging"), module("nodes.comfy_lora")
        self.files, self.specs = (
            module("iteris_core.lora_files.tensors"),
            module("nodes.concept_specs"),
        )
        self.reduced, self.folder = reduced, folder
        self.model, self.clip = reduced.make()
        self.paths = [self._write_lora(seed) for seed in (1, 2)]
        self.calibration = self.core.Calibration(
            samples=len(PROMPTS), timesteps=2, denoising_steps=3, latent_size=reduced.side
        )

    def merge(self, count: int, rows: int = 32) -> Any:
        """Of the first ``count`` LoRAs; ``rows`` is the most in a forward."""
        concepts = self.concepts(count)
        result = self.merging.merge_on(
            self.model,
            self.clip,
            concepts,
            "iteris",
            self.reduced.settings,
            self.calibration,
            rows=rows,
        )
        if left_out := result.report.notes.get("sites"):
            raise self.core.IterisError("; ".join(left_out))
        return result

    def concepts(self, count: int) -> list[Any]:
        make = self.specs.make_spec
        specs = [make(path, trigger="sks", class_word="cat") for path in self.paths[:count]]
        return [dataclasses.replace(spec, prompts=PROMPTS) for spec in specs]

    def alone(self) -> float:
        """How far a merge of one LoRA is from that LoRA, as a share of what it does."""
        result = self.merge(1)
        found = self.draw(*self.node(result, 1))
        wanted, plain = self.draw(*self.stock(self.paths[0])), self.draw(self.model, self.clip)
        return relative(found - wanted, plain - wanted)

    def rows_and_file(self) -> tuple[float, float]:
        """The site at which merges with many and with few rows in a forward differ most, and how
        far the saved file is from what the node gives."""
        many, few = self.merge(2), self.merge(2, rows=5)
        apart = {
            site: relative(few.lora.sites[site].dense() - change.dense(), change.dense())
            for site, change in many.lora.sites.items()
        }
        found, plain = self.draw(*self.node(many, 2)), self.draw(self.model, self.clip)
        saved = self.draw(*self.stock(self.save(many)))
        return max(apart.values()), relative(saved - found, plain - found)

    def node(self, result: Any, count: int) -> tuple[Any, Any]:
        """What the merge node hands on."""
        tensors = self.merging.as_lora_model(result, self.concepts(count), "float32")
        return self.lora.apply_lora(self.model, self.clip, tensors)

    def save(self, result: Any) -> Path:
        """As the node that saves does it."""
        tensors = self.merging.as_lora_model(result, self.concepts(2), "float32")
        path = self.folder / "merged.safetensors"
        self.files.save_atomically(dict(tensors), path, tensors.metadata)
        return path

    def stock(self, path: Path) -> tuple[Any, Any]:
        """ComfyUI's own loader."""
        import comfy.sd
        import comfy.utils

        tensors = comfy.utils.load_torch_file(str(path))
        model, clip = comfy.sd.load_lora_for_models(self.model, self.clip, tensors, 1.0, 1.0)
        modules = sum(key.endswith((".lora_B.weight", ".lora_up.weight")) for key in tensors)
        assert len(model.patches) + len(clip.patcher.patches) == modules
        return model, clip

    def draw(self, model: Any, clip: Any) -> Tensor:
        import comfy.sample
        import comfy.samplers

        def text(prompt: str) -> Any:
            return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))

        with torch.inference_mode():
            side = self.reduced.side
            empty = comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, 4, side, side))
            noise = torch.randn(empty.shape, generator=torch.Generator().manual_seed(3))
            sampler = comfy.samplers.KSampler(
                model, 3, model.load_device, "euler", "simple", model_options=model.model_options
            )
            drawn = sampler.sample(
                noise, text(LONG), text(""), cfg=2.0, latent_image=empty, disable_pbar=True
            )
        return drawn.clone()

    def layers(self) -> Mapping[str, nn.Linear]:
        """Name in a file → layer: all that are linear, of the denoiser and the text encoders."""
        roots = {
            "diffusion_model": self.model.model.diffusion_model,
            "text_encoders": self.clip.cond_stage_model,
        }
        found = {
            f"{root}.{path}": layer
            for root, module in roots.items()
            for path, layer in module.named_modules()
            if isinstance(layer, nn.Linear)
        }
        apart = (EYES, *self.reduced.apart)
        return {name: m for name, m in found.items() if not any(part in name for part in apart)}

    def _write_lora(self, seed: int) -> Path:
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers().items():
            out, width = layer.weight.shape
            down = torch.randn(RANK, width, generator=generator) / width**0.5
            tensors[f"{name}.lora_A.weight"] = down
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) / 8
        path = self.folder / f"{seed}.safetensors"
        save_file(tensors, path)
        return path


def relative(gap: Tensor, whole: Tensor) -> float:
    return float(gap.double().norm() / whole.double().norm())
