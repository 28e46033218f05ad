"""What differs between the pipelines of diffusers: how prompts and latents become a forward.

A family says which parts it needs, what its prompts are encoded to, and which arguments its
denoiser takes. Everything else is the pipeline's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import IterisError

Conditioning = dict[str, Tensor]
"""What the text encoders give, rows first; ``states``, (rows, tokens, width), is always there."""


@dataclass(frozen=True)
class Family:
    """``denoiser`` is the name of that component, ``text_parts`` those that encode prompts.

    ``encode(pipeline, prompts)`` gives the conditioning. ``arguments(pipeline, latents, timesteps,
    conditioning, guidance)`` are those of the denoiser's forward. ``latent_shape(pipeline, side)``
    is the shape of one row's latents, ``side`` being None for the model's own size.
    ``empty_prompts`` tells whether guidance runs on the empty prompt; else the model takes its
    scale as an input. ``even_sigmas`` tells that the pipeline spaces noise levels evenly from 1 to
    1 / steps instead of as its scheduler would.
    """

    title: str
    denoiser: str
    text_parts: tuple[str, ...]
    encode: Callable[[Any, list[str]], Conditioning]
    arguments: Callable[[Any, Tensor, Tensor, Conditioning, float], dict[str, Any]]
    latent_shape: Callable[[Any, int | None], tuple[int, ...]]
    empty_prompts: bool = True
    even_sigmas: bool = False


def _encode_sd(pipeline: Any, prompts: list[str]) -> Conditioning:
    return {"states": pipeline.encode_prompt(prompts, pipeline._execution_device, 1, False)[0]}


def _encode_sdxl(pipeline: Any, prompts: list[str]) -> Conditioning:
    states, _, pooled, _ = pipeline.encode_prompt(
        prompts, device=pipeline._execution_device, do_classifier_free_guidance=False
    )
    if pipeline.config.get("force_zeros_for_empty_prompt"):  # so does its guidance
        filled = torch.tensor([prompt != "" for prompt in prompts]).to(states)
        states, pooled = states * filled[:, None, None], pooled * filled[:, None]
    return {"states": states, "pooled": pooled}


def _encode_sd3(pipeline: Any, prompts: list[str]) -> Conditioning:
    states, _, pooled, _ = pipeline.encode_prompt(
        prompts,
        None,
        None,
        device=pipeline._execution_device,
        do_classifier_free_guidance=False,
        max_sequence_length=_length(getattr(pipeline, "tokenizer_3", None), 256),
    )
    return {"states": states, "pooled": pooled}


def _encode_flux(pipeline: Any, prompts: list[str]) -> Conditioning:
    states, pooled, _ = pipeline.encode_prompt(
        prompts,
        device=pipeline._execution_device,
        max_sequence_length=_length(pipeline.tokenizer_2, 512),
    )
    return {"states": states, "pooled": pooled}


def _length(tokenizer: Any, most: int) -> int:
    """The pipeline's default number of T5 tokens, or fewer where the tokenizer says so."""
    return min(most, getattr(tokenizer, "model_max_length", most))


def _sd_arguments(
    pipeline: Any, latents: Tensor, timesteps: Tensor, text: Conditioning, guidance: float
) -> dict[str, Any]:
    return {"sample": latents, "timestep": timesteps, "encoder_hidden_states": text["states"]}


def _sdxl_arguments(
    pipeline: Any, latents: Tensor, timesteps: Tensor, text: Conditioning, guidance: float
) -> dict[str, Any]:
    height, width = (pipeline.vae_scale_factor * side for side in latents.shape[-2:])
    # Original size, corner of the crop, target size: those of a picture that is not cropped.
    sizes = torch.tensor([[height, width, 0, 0, height, width]]).to(latents)
    added = {"text_embeds": text["pooled"], "time_ids": sizes.repeat(len(latents), 1)}
    return {
        **_sd_arguments(pipeline, latents, timesteps, text, guidance),
        "added_cond_kwargs": added,
    }


def _sd3_arguments(
    pipeline: Any, latents: Tensor, timesteps: Tensor, text: Conditioning, guidance: float
) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": timesteps,
        "encoder_hidden_states": text["states"],
        "pooled_projections": text["pooled"],
    }


def _flux_arguments(
    pipeline: Any, latents: Tensor, timesteps: Tensor, text: Conditioning, guidance: float
) -> dict[str, Any]:
    side = math.isqrt(latents.shape[1])
    scale = None
    if pipeline.transformer.config.guidance_embeds:
        scale = torch.full([len(latents)], guidance, device=latents.device)
    return {
        **_sd3_arguments(pipeline, latents, timesteps.to(latents.dtype) / 1000, text, guidance),
        "guidance": scale,
        "txt_ids": latents.new_zeros(text["states"].shape[1], 3),
        "img_ids": pipeline._prepare_latent_image_ids(
            len(latents), side, side, latents.device, latents.dtype
        ),
    }


def _square(pipeline: Any, side: int | None) -> tuple[int, ...]:
    """(channels, side, side)"""
    config = (pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer).config
    side = side or int(config.sample_size)
    return (int(config.in_channels), side, side)


def _packed(pipeline: Any, side: int | None) -> tuple[int, ...]:
    """(patches, channels): 2 × 2 latents make a patch."""
    half = (side or int(pipeline.default_sample_size)) // 2
    return (half * half, int(pipeline.transformer.config.in_channels))


FAMILIES: Mapping[str, Family] = {
    "sd": Family(
        "SD 1.x and 2.x", "unet", ("text_encoder", "tokenizer"),
        _encode_sd, _sd_arguments, _square,
    ),
    "sdxl": Family(
        "SDXL", "unet", ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        _encode_sdxl, _sdxl_arguments, _square,
    ),
    "sd3": Family(
        "SD 3 and 3.5", "transformer",
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        _encode_sd3, _sd3_arguments, _square,
    ),
    "flux": Family(
        "FLUX.1", "transformer", ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        _encode_flux, _flux_arguments, _packed, empty_prompts=False, even_sigmas=True,
    ),
}  # fmt: skip

_DENOISERS = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline. Raises :class:`IterisError` where it has none or lacks a part."""
    kind = type(pipeline).__name__
    unet, transformer = (getattr(pipeline, name, None) for name in ("unet", "transformer"))
    if unet is not None:
        name = "sdxl" if getattr(unet.config, "addition_embed_type", None) else "sd"
    else:
        name = _DENOISERS.get(type(transformer).__name__)
    if name is None:
        titles = ", ".join(family.title for family in FAMILIES.values())
        raise IterisError(
            f"{kind} has no unet or transformer that LoRAs can be merged on here; there are "
            f"hosts for pipelines of {titles}."
        )
    family = FAMILIES[name]
    for part in (*family.text_parts, "scheduler"):
        if getattr(pipeline, part, None) is None:
            raise IterisError(f"{kind} has no {part}. Load the whole pipeline.")
    config = getattr(pipeline, family.denoiser).config
    if config.get("out_channels") not in (None, config.in_channels):
        raise IterisError(
            f"{kind} takes more than latents ({config.in_channels} channels in, "
            f"{config.out_channels} out: inpainting or control), which this host has not. Merge on "
            "the base model that it was made from; the LoRA fits both."
        )
    return family
