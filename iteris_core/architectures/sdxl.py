"""SDXL"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import text, unet
from .marks import reads_all_but_t5, square_latents
from .pieces import Shapes
from .record import Architecture, Conditioning, Fit, PipelineCalls


def _fits_sites(shapes: Shapes) -> Fit:
    has_unet = any(site.startswith("unet.") for site in shapes)
    return Fit.SURE if has_unet and unet.is_xl(shapes) else Fit.NO


def _fits_file(shapes: Shapes, metadata: Mapping[str, str]) -> Fit:
    return Fit.SURE if unet.is_file(shapes) and unet.is_file_of_xl(shapes, metadata) else Fit.NO


def _models() -> Mapping[str, nn.Module]:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    sizes: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    return {
        "text_encoder": text.clip(768, 12, projected=False),
        "text_encoder_2": text.clip(1280, 32, projected=True),
        "unet": UNet2DConditionModel(**sizes),
    }


def _encode(pipeline: Any, prompts: list[str]) -> Conditioning:
    states, _, pooled, _ = pipeline.encode_prompt(
        prompts, device=pipeline._execution_device, do_classifier_free_guidance=False
    )
    if pipeline.config.get("force_zeros_for_empty_prompt"):  # so does its guidance
        filled = torch.tensor([prompt != "" for prompt in prompts]).to(states)
        states, pooled = states * filled[:, None, None], pooled * filled[:, None]
    return {"states": states, "pooled": pooled}


def _arguments(
    pipeline: Any, latents: Tensor, timesteps: Tensor, text: Conditioning, guidance: float
) -> dict[str, Any]:
    height, width = (pipeline.vae_scale_factor * side for side in latents.shape[-2:])
    # Original size, corner of the crop, target size: those of a picture that is not cropped.
    sizes = torch.tensor([[height, width, 0, 0, height, width]]).to(latents)
    added = {"text_embeds": text["pooled"], "time_ids": sizes.repeat(len(latents), 1)}
    return {
        **unet.arguments(pipeline, latents, timesteps, text, guidance),
        "added_cond_kwargs": added,
    }


ARCHITECTURE = Architecture(
    name="sdxl", title="SDXL", fits_sites=_fits_sites, fits_file=_fits_file, models=_models,
    denoiser="unet", original_names=unet.aliases, native=True,
    text_prefixes=("lora_te1", "lora_te2"), version="sdxl_base_v1-0",
    modelspec="stable-diffusion-xl-v1-base", one_alpha=("unet", "text_encoder", "text_encoder_2"),
    diffusers_reads=reads_all_but_t5, wirings=unet.WIRINGS,
    pipeline=PipelineCalls(
        pipeline="StableDiffusionXLPipeline", denoisers=("UNet2DConditionModel",),
        single_files=("xl_base", "playground-v2-5"),
        parts=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"), encode=_encode,
        arguments=_arguments, latent_shape=square_latents,
    ),
)  # fmt: skip
