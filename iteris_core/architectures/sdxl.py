"""SDXL"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import unet
from .record import Conditioning


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
    usual = unet.arguments(pipeline, latents, timesteps, text, guidance)
    return {**usual, "added_cond_kwargs": added}


ARCHITECTURE = unet.stable_diffusion(
    "sdxl",
    "SDXL",
    {
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
    },
    encoders=((768, 12, False), (1280, 32, True)),
    native=True,
    version="sdxl_base_v1-0",
    modelspec="stable-diffusion-xl-v1-base",
    pipeline="StableDiffusionXLPipeline",
    single_files=("xl_base", "playground-v2-5"),
    encode=_encode,
    arguments=_arguments,
)
