"""SD 2.x"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from . import text, unet


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


ARCHITECTURE = unet.stable_diffusion(
    "sd2",
    "SD 2.x",
    _models,
    wide=True,
    clips=("clip_h",),
    version="sd_v2",
    modelspec="stable-diffusion-v2-512",
)
