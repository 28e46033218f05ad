"""Full-size pipelines with random weights, made on the device itself; nothing is downloaded.

Text encoders have the released width but only two layers, because their cost is not measured.
``tiny`` ones are the reduced pipelines of the tests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import denoisers
import torch
import transformers
from speed.models import random_lora
from torch import nn

from iteris_core import Concept
from iteris_core.hosts.diffusers import DiffusersHost

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bases import clip_config
from pipelines import PIPELINES, texts

RANK = 16
WORDS = 77  # that CLIP reads


def clip(width: int, kind: str = "CLIPTextModel") -> nn.Module:
    config = clip_config(width)
    config.max_position_embeddings = WORDS
    return getattr(transformers, kind)(config)


def stable_diffusion() -> Mapping[str, nn.Module]:
    return {"unet": denoisers.sd15(), "text_encoder": clip(768)}


def sdxl() -> Mapping[str, nn.Module]:
    second = clip(1280, "CLIPTextModelWithProjection")
    return {"unet": denoisers.sdxl(), "text_encoder": clip(768), "text_encoder_2": second}


def flux() -> Mapping[str, nn.Module]:
    second = texts.t5(width=4096)
    return {"transformer": denoisers.flux(), "text_encoder": clip(768), "text_encoder_2": second}


def z_image() -> Mapping[str, nn.Module]:
    encoder = texts.language_model("Qwen3Model", hidden_size=2560)
    return {"transformer": denoisers.z_image(), "text_encoder": encoder}


@dataclass(frozen=True)
class Model:
    """``reduced`` names the tests' pipeline, in which ``parts`` replaces modules by large ones;
    ``side`` is an image's side in latents, ``changed`` are suffixes of the sites that its LoRAs
    change."""

    reduced: str
    parts: Callable[[], Mapping[str, nn.Module]]
    side: int
    changed: tuple[str, ...] = (".to_q", ".to_k", ".to_v", ".to_out.0")


MODELS = {
    "SD 1.5, 512 px": Model("SD 1.5", stable_diffusion, 64),
    "SDXL, 1024 px": Model("SDXL", sdxl, 128),
    "FLUX.1, 1024 px": Model("FLUX.1", flux, 128),
    "Z-Image, 1024 px": Model("Z-Image", z_image, 128),
}


def make_host(
    model: Model,
    device: torch.device,
    *,
    tiny: bool,
    fp8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> DiffusersHost:
    """With ``fp8`` the denoiser's weights are float8, and are cast when used."""
    pipeline = PIPELINES[model.reduced]().pipeline
    if not tiny:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                parts = model.parts()
        finally:
            torch.set_default_dtype(before)
        for name, part in parts.items():
            setattr(pipeline, name, filled(part, device))
        for name in ("tokenizer", "tokenizer_2"):
            words = getattr(pipeline, name, None)
            if words is not None and type(words).__name__ == "CLIPTokenizer":
                words.model_max_length = WORDS
    pipeline.to(device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    if fp8:
        denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    return DiffusersHost(pipeline)


@torch.no_grad()
def filled(module: nn.Module, device: torch.device) -> nn.Module:
    """Random weights, scaled by fan-in so that activations neither vanish nor grow."""
    generator = torch.Generator(device).manual_seed(0)
    for weight in module.parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
    return module.eval().requires_grad_(False)


def concepts(model: Model, host: DiffusersHost) -> list[Concept]:
    """Two concepts whose LoRAs change the denoiser's attention."""

    def changed(site: str) -> bool:
        return site.endswith(model.changed) and not site.startswith("text_encoder")

    loras = (random_lora(host, seed, RANK, changed) for seed in (1, 2))
    return [Concept(lora, trigger=f"sks{n}", class_word="cat") for n, lora in enumerate(loras, 1)]
