"""Denoisers at their released size, from diffusers' classes; no weights are downloaded.

Without a given size the class's default applies, which is the released model's: FLUX.1, Z-Image,
Qwen-Image and Wan 2.1 14B.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def _made(kind: str, **size: Any) -> nn.Module:
    import diffusers

    return getattr(diffusers, kind)(**size)


def sd15() -> nn.Module:
    return _made("UNet2DConditionModel", cross_attention_dim=768, sample_size=64)


def sdxl() -> nn.Module:
    return _made(
        "UNet2DConditionModel", sample_size=128, block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def flux() -> nn.Module:
    return _made("FluxTransformer2DModel", guidance_embeds=True)


def z_image() -> nn.Module:
    return _made("ZImageTransformer2DModel")


def qwen_image() -> nn.Module:
    return _made("QwenImageTransformer2DModel")


def wan() -> nn.Module:
    return _made("WanTransformer3DModel")
