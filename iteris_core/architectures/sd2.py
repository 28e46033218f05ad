"""SD 2.x"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from . import text, unet
from .marks import reads_all_but_t5, square_latents
from .record import Architecture, PipelineCalls


def _models() -> Mapping[str, nn.Module]:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    sizes: dict[str, Any] = {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    }
    return {
        "text_encoder": text.clip(1024, 23, projected=False),
        "unet": UNet2DConditionModel(**sizes),
    }


ARCHITECTURE = Architecture(
    name="sd2",
    title="SD 2.x",
    fits_sites=partial(unet.fits_sites, wide=True),
    fits_file=partial(unet.fits_file, wide=True),
    models=_models,
    denoiser="unet",
    original_names=unet.aliases,
    text_prefixes=("lora_te",),
    clips=("clip_h",),
    version="sd_v2",
    modelspec="stable-diffusion-v2-512",
    one_alpha=("unet", "text_encoder"),
    diffusers_reads=reads_all_but_t5,
    wirings=unet.WIRINGS,
    pipeline=PipelineCalls(
        pipeline="StableDiffusionPipeline",
        denoisers=unet.DENOISERS,
        single_files=("v2",),
        parts=("text_encoder", "tokenizer"),
        encode=unet.encode,
        arguments=unet.arguments,
        latent_shape=square_latents,
    ),
)
