"""A MODEL and CLIP, with helpers for the host's tests."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

EXPERTS = {
    f"diffusion_model.blocks.{block}.{layer}": (96, 96)
    for block in range(2)
    for layer in ("self_attn.q", "self_attn.v", "self_attn.o", "cross_attn.k", "cross_attn.o")
}
"""What a LoRA of the reduced Wan changes."""


def merge_on(
    merging: Any,
    model: Any,
    clip: Any,
    concepts: Sequence[Any],
    method: str,
    settings: dict[str, Any],
    calibration: Any,
    *,
    unmergeable: str = "mean",
    **options: Any,
) -> Any:
    """A merge by ``merging``, the pack's module of that name."""
    config = merging.MergeConfig(
        concepts=tuple(concepts), method=method, settings=settings,
        calibration=asdict(calibration), unmergeable=unmergeable,
    )  # fmt: skip
    return merging.merge_on(model, clip, config, **options)


class Kit:
    """The pack's modules, a MODEL and CLIP, and the usual merge on them."""

    def __init__(self, pack: ModuleType, thin: tuple[Any, Any], models: Path) -> None:
        def module(name: str) -> Any:
            return importlib.import_module(f"{pack.__name__}.{name}")

        self.core, self.merging = module("iteris_core"), module("nodes.merging")
        self.host, self.sampling = module("nodes.comfy_host"), module("nodes.comfy_sampling")
        self.denoiser, self.text = module("nodes.comfy_denoiser"), module("nodes.comfy_text")
        self.lora, self.specs = module("nodes.comfy_lora"), module("nodes.concept_specs")
        self.read_concept = module("iteris_core.reading").read_concept
        self.model, self.clip = thin
        self.loras = models / "models" / "loras"
        self.calibration = self.core.Calibration(
            samples=4, timesteps=2, denoising_steps=4, latent_size=8
        )

    def concepts(self) -> list[Any]:
        make = self.specs.make_spec
        return [
            make(self.loras / "a.safetensors", trigger="sks", class_word="cat"),
            make(self.loras / "b.safetensors", trigger="zwx", class_word="dog", strength=0.7),
        ]

    def merge(self, settings: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        self.merging._RememberingHost._last = ()
        model, clip = kwargs.pop("on", (self.model, self.clip))
        settings = {"precision": "float64", **(settings or {})}
        on = (self.merging, model, clip)
        return merge_on(*on, self.concepts(), "iteris", settings, self.calibration, **kwargs)

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What MODEL and CLIP give, through ComfyUI's own sampler."""
        import comfy.sample
        import comfy.samplers

        with torch.inference_mode():
            text = self.clip.encode_from_tokens_scheduled(self.clip.tokenize("a (sks:1.2) cat"))
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
            sampler = comfy.samplers.KSampler(
                self.model,
                2,
                self.model.load_device,
                "euler",
                "normal",
                1.0,
                self.model.model_options,
            )
            drawn = sampler.sample(
                noise, text, text, cfg=3.0, latent_image=torch.zeros_like(noise), disable_pbar=True
            )
        return text[0][0].clone(), drawn.clone()

    def hooks(self) -> int:
        roots = (self.model.model, self.clip.cond_stage_model)
        modules = [module for root in roots for module in root.modules()]
        stray = sum("encode" in module.__dict__ for module in modules)
        return stray + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def distance(found: Any, wanted: Any) -> float:
    """Largest relative difference of a site."""
    assert set(found.sites) == set(wanted.sites)
    return max(
        float((found.sites[s].dense().double() - w.dense().double()).norm()
              / w.dense().double().norm())
        for s, w in wanted.sites.items()
    )  # fmt: skip
