"""Measurements on every architecture: a merge of one LoRA, of two, and its file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from architecture_results import drift_in
from kit import merge_on
from reduced_models import RANK, Reduced
from safetensors.torch import save_file
from torch import Tensor, nn

LONG = "a photo of a sks cat with a red hat on a wooden table beside an open window, " * 8
"""Over 77 tokens of every tokenizer."""
QUOTED = 'a sks cat with a sign that says "cat"'
PROMPTS = ("", "a sks cat", "a sks dog", "a sks hat", QUOTED, LONG)
UNREACHED = (".visual.", ".vision_model.", ".multi_modal_projector.", ".lm_head")
"""Layers of a text encoder that only pictures reach, or that make words of its states."""


class Trial:
    """One architecture's MODEL and CLIP, and two LoRAs of theirs under the names that ComfyUI has
    for every class."""

    def __init__(self, pack: ModuleType, reduced: Reduced, folder: Path) -> None:
        def module(name: str) -> Any:
            return importlib.import_module(f"{pack.__name__}.{name}")

        self.core = module("iteris_core")
        self.merging, self.lora = module("nodes.merging"), module("nodes.comfy_lora")
        self.conds = module("nodes.comfy_conds")
        self.tensors, self.specs = (
            module("iteris_core.lora_files.tensors"),
            module("nodes.concept_specs"),
        )
        self.reduced, self.folder, self.drift = reduced, folder, ""
        self.model, self.clip = reduced.make()
        self.paths = [self.write_lora(seed) for seed in (1, 2)]
        self.calibration = self.core.Calibration(
            samples=len(PROMPTS), timesteps=2, denoising_steps=3, latent_size=reduced.side
        )

    def merge(self, count: int, rows: int = 32, **settings: Any) -> Any:
        """Of the first ``count`` LoRAs; ``rows`` is the most in a forward."""
        concepts = self.concepts(count)
        return merge_on(
            self.merging,
            self.model,
            self.clip,
            concepts,
            "iteris",
            {**self.reduced.settings, **settings},
            self.calibration,
            rows=rows,
            **self.options(),
        )

    def options(self) -> dict[str, Any]:
        """How else it is merged: nothing may be left out."""
        given = [[torch.zeros(1, 1, 1), self.reduced.entries]]
        return {"references": self.conds.References.of(given), "unmergeable": "refuse"}

    def concepts(self, count: int) -> list[Any]:
        make = self.specs.make_spec
        specs = [make(path, trigger="sks", class_word="cat") for path in self.paths[:count]]
        return [spec.model_copy(update={"prompts": PROMPTS}) for spec in specs]

    def alone(self) -> float:
        """How far a merge of one LoRA is from that LoRA, as a share of what it does."""
        found = self.draw(*self.node(self.merge(1)))
        wanted, plain = self.draw(*self.stock(*self.files(0))), self.draw(*self.base)
        return relative(found - wanted, plain - wanted)

    def rows_and_file(self) -> tuple[float, float]:
        """The site at which merges with many and with few rows in a forward differ most, and how
        far the saved file is from what the node gives."""
        many, few = self.merge(2), self.merge(2, rows=5)
        self.drift = drift_in(many.report.notes)
        apart = {
            site: relative(few.lora.sites[site].dense() - change.dense(), change.dense())
            for site, change in many.lora.sites.items()
        }
        found, plain = self.draw(*self.node(many)), self.draw(*self.base)
        saved = self.draw(*self.stock(*self.save(many)))
        return max(apart.values()), relative(saved - found, plain - found)

    @property
    def base(self) -> tuple[Any, ...]:
        """What is drawn with."""
        return self.model, self.clip

    def files(self, number: int) -> tuple[Path, ...]:
        return (self.paths[number],)

    def node(self, result: Any) -> tuple[Any, ...]:
        """What the merge node hands on."""
        tensors = self.merging.as_lora_model(result, "float32")
        return self.lora.apply_lora(self.model, self.clip, tensors)

    def save(self, result: Any) -> tuple[Path, ...]:
        return (self.saved(self.merging.as_lora_model(result, "float32"), "merged"),)

    def stock(self, *files: Path) -> tuple[Any, ...]:
        return self.loaded(self.model, files[0])

    def saved(self, tensors: Any, name: str) -> Path:
        """As the node that saves does it."""
        path = self.folder / f"{name}.safetensors"
        self.tensors.save_atomically(dict(tensors), path, tensors.metadata)
        return path

    def loaded(self, model: Any, path: Path) -> tuple[Any, Any]:
        """MODEL and CLIP by ComfyUI's own loader."""
        import comfy.sd
        import comfy.utils

        tensors = comfy.utils.load_torch_file(str(path))
        model, clip = comfy.sd.load_lora_for_models(model, self.clip, tensors, 1.0, 1.0)
        modules = sum(key.endswith((".lora_B.weight", ".lora_up.weight")) for key in tensors)
        assert len(model.patches) + len(clip.patcher.patches) == modules
        return model, clip

    def draw(self, model: Any, clip: Any) -> Tensor:
        import comfy.samplers

        # Keys and values that ComfyUI keeps by the text alone would be those of another LoRA.
        getattr(model.model.diffusion_model, "clear_kv_cache", lambda: None)()
        with torch.inference_mode():
            noise, empty = self.latents()
            sampler = comfy.samplers.KSampler(
                model, 3, model.load_device, "euler", "simple", model_options=model.model_options
            )
            texts = self.text(clip, LONG), self.text(clip, "")
            drawn = sampler.sample(
                noise, *texts, cfg=2.0, latent_image=empty, disable_pbar=True, seed=0
            )
        return drawn.clone()

    def text(self, clip: Any, prompt: str) -> Any:
        found = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        return [[states, {**own, **self.reduced.entries}] for states, own in found]

    def latents(self) -> tuple[Tensor, Tensor]:
        """Noise, and what is empty."""
        import comfy.sample

        side = self.reduced.side
        empty = torch.zeros(self.reduced.shape or (1, 4, side, side))
        empty = comfy.sample.fix_empty_latent_channels(self.model, empty)
        if self.reduced.video:
            empty = empty.repeat_interleave(3, dim=2)
        return torch.randn(empty.shape, generator=torch.Generator().manual_seed(3)), empty

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
        apart = (*UNREACHED, *self.reduced.apart)
        return {name: m for name, m in found.items() if not any(part in name for part in apart)}

    def write_lora(self, seed: int, root: str = "") -> Path:
        """Of the layers whose names begin with ``root``."""
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        layers = {n: layer for n, layer in self.layers().items() if n.startswith(root)}
        for name, layer in layers.items():
            out, width = layer.weight.shape
            down = torch.randn(RANK, width, generator=generator) / width**0.5
            tensors[f"{name}.lora_A.weight"] = down
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) / 8
        path = self.folder / f"{seed}.safetensors"
        save_file(tensors, path)
        return path


def relative(gap: Tensor, whole: Tensor) -> float:
    return float(gap.double().norm() / whole.double().norm())
