"""ComfyUI's own classes at reduced widths, with random weights: every architecture in seconds.

ComfyUI tells architectures by their full widths, so no checkpoint of these can be detected; they
are made from its classes as its loader would make them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cosmos import cosmos, cosmos_predict2
from .flux import chroma, chroma_radiance, flux, flux2, flux_fill, flux_kontext, flux_schnell
from .parts import RANK, write_lora
from .pictures import (
    aura_flow,
    hidream,
    hunyuan_dit,
    hunyuan_image,
    kandinsky5_image,
    lumina2,
    omnigen2,
    pixart_sigma,
    qwen,
    sd3,
    sd35_medium,
    zimage,
)
from .unets import (
    cascade_b,
    cascade_c,
    sd2,
    sd15,
    sd15_inpainting,
    sd15_instructpix2pix,
    sdxl,
    sdxl_inpainting,
    sdxl_refiner,
)
from .videos import (
    hunyuan_video,
    hunyuan_video15,
    hunyuan_video_i2v,
    kandinsky5_video,
    ltxv,
    mochi,
    wan,
    wan22_5b,
    wan_i2v,
)

__all__ = [
    "ARCHITECTURES",
    "RANK",
    "Reduced",
    "flux",
    "flux_kontext",
    "qwen",
    "sdxl",
    "wan",
    "write_lora",
    "zimage",
]


@dataclass(frozen=True)
class Reduced:
    """``side`` is that of its latents; ``apart`` are parts of the names of layers that cannot be
    merged, and ``left_out`` says why."""

    make: Callable[[], tuple[Any, Any]]
    side: int = 8
    apart: tuple[str, ...] = ()
    left_out: str = ""


ARCHITECTURES = {
    "SD 1.5": Reduced(sd15),
    "SD 1.5 inpainting": Reduced(sd15_inpainting),
    "InstructPix2Pix": Reduced(sd15_instructpix2pix),
    "SD 2": Reduced(sd2),
    "SDXL": Reduced(sdxl),
    "SDXL inpainting": Reduced(sdxl_inpainting),
    "SDXL refiner": Reduced(sdxl_refiner),
    "Stable Cascade C": Reduced(cascade_c),
    "Stable Cascade B": Reduced(cascade_b, side=16),
    "SD 3": Reduced(sd3),
    "SD 3.5 medium": Reduced(sd35_medium),
    "AuraFlow": Reduced(aura_flow),
    "PixArt Sigma": Reduced(pixart_sigma, side=34),
    "HunyuanDiT": Reduced(hunyuan_dit),
    "FLUX.1": Reduced(flux),
    "FLUX.1 schnell": Reduced(flux_schnell),
    "FLUX.1 Kontext": Reduced(flux_kontext),
    "FLUX.1 Fill": Reduced(flux_fill),
    "FLUX.2": Reduced(flux2),
    "Chroma": Reduced(chroma),
    "Chroma Radiance": Reduced(chroma_radiance, side=64),
    "Lumina 2": Reduced(lumina2),
    "Z-Image": Reduced(zimage),
    "Qwen-Image": Reduced(qwen),
    "HunyuanImage 2.1": Reduced(hunyuan_image),
    "HiDream": Reduced(hidream),
    "OmniGen 2": Reduced(omnigen2),
    "Kandinsky 5 image": Reduced(kandinsky5_image),
    "Cosmos Predict2": Reduced(cosmos_predict2),
    "Cosmos 1": Reduced(cosmos),
    "HunyuanVideo": Reduced(hunyuan_video),
    "HunyuanVideo I2V": Reduced(hunyuan_video_i2v),
    "HunyuanVideo 1.5": Reduced(hunyuan_video15),
    "Wan 2.1 T2V": Reduced(wan),
    "Wan 2.1 I2V": Reduced(wan_i2v),
    "Wan 2.2 5B": Reduced(wan22_5b),
    "LTX-Video": Reduced(ltxv),
    "Mochi": Reduced(mochi),
    "Kandinsky 5 video": Reduced(kandinsky5_video),
}
