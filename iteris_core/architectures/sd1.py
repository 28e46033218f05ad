"""SD 1.x"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from . import text, unet


def _models() -> Mapping[str, nn.Module]:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return {
        "text_encoder": text.clip(768, 12, projected=False),
        "unet": UNet2DConditionModel(cross_attention_dim=768),
    }


ARCHITECTURE = unet.stable_diffusion(
    "sd1",
    "SD 1.x",
    _models,
    wide=False,
    version="sd_v1",
    modelspec="stable-diffusion-v1",
)
