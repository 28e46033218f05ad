"""SD 1.x"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import nn

from . import text, unet
from .marks import reads_all_but_t5, square_latents
from .record import Architecture, PipelineCalls


def _models() -> Mapping[str, nn.Module]:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return {
        "text_encoder": text.clip(768, 12, projected=False),
        "unet": UNet2DConditionModel(cross_attention_dim=768),
    }


ARCHITECTURE = Architecture(
    name="sd1",
    title="SD 1.x",
    fits_sites=partial(unet.fits_sites, wide=False),
    fits_file=partial(unet.fits_file, wide=False),
    models=_models,
    denoiser="unet",
    original_names=unet.aliases,
    text_prefixes=("lora_te",),
    version="sd_v1",
    modelspec="stable-diffusion-v1",
    one_alpha=("unet", "text_encoder"),
    diffusers_reads=reads_all_but_t5,
    wirings=unet.WIRINGS,
    pipeline=PipelineCalls(
        pipeline="StableDiffusionPipeline",
        denoisers=unet.DENOISERS,
        single_files=("v1",),
        parts=("text_encoder", "tokenizer"),
        encode=unet.encode,
        arguments=unet.arguments,
        latent_shape=square_latents,
    ),
)
