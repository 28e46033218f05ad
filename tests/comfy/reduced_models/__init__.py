"""ComfyUI's own classes at reduced widths, with random weights: every architecture in seconds.

ComfyUI tells architectures by their full widths, so no checkpoint of these can be detected; they
are made from its classes as its loader would make them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .flux import chroma, chroma_radiance, flux, flux2, flux_fill, flux_narrow, flux_schnell
from .parts import RANK, write_lora
from .pictures import (
    aura_flow,
    cosmos_predict2,
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
    sdxl_narrow,
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
    "qwen",
    "sdxl",
    "wan",
    "write_lora",
    "zimage",
]


@dataclass(frozen=True)
class Reduced:
    """``side`` is that of its latents, ``settings`` those of its merges; ``apart`` are parts of the
    names of layers that cannot be merged, and ``left_out`` says why. Those that ``slow`` marks have
    a near relative that is not."""

    make: Callable[[], tuple[Any, Any]]
    side: int = 8
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    apart: tuple[str, ...] = ()
    left_out: str = ""
    slow: bool = False


_FLATTENED = "its forward joins the rows of a batch to one"
_EVERY_CALL = {"schedule": "jacobi"}

ARCHITECTURES = {
    "SD 1.5": Reduced(sd15),
    "SD 1.5 inpainting": Reduced(sd15_inpainting, slow=True),
    "InstructPix2Pix": Reduced(sd15_instructpix2pix, slow=True),
    "SD 2": Reduced(sd2, slow=True),
    "SDXL": Reduced(sdxl_narrow),
    "SDXL inpainting": Reduced(sdxl_inpainting, slow=True),
    "SDXL refiner": Reduced(sdxl_refiner, slow=True),
    "Stable Cascade C": Reduced(cascade_c),
    "Stable Cascade B": Reduced(cascade_b, side=16, settings=_EVERY_CALL, slow=True),
    "SD 3": Reduced(sd3, slow=True),
    "SD 3.5 medium": Reduced(sd35_medium, slow=True),
    "AuraFlow": Reduced(aura_flow),
    "PixArt Sigma": Reduced(
        pixart_sigma,
        side=34,
        apart=("cross_attn.kv_linear",),
        left_out=f"cross_attn.kv_linear: {_FLATTENED}",
    ),
    "HunyuanDiT": Reduced(
        hunyuan_dit, apart=("mlp_t5.", "pooler."), left_out=f"mlp_t5 and pooler: {_FLATTENED}"
    ),
    "FLUX.1": Reduced(flux_narrow),
    "FLUX.1 schnell": Reduced(flux_schnell, slow=True),
    "FLUX.1 Fill": Reduced(flux_fill),
    "FLUX.2": Reduced(flux2),
    "Chroma": Reduced(chroma),
    "Chroma Radiance": Reduced(
        chroma_radiance,
        side=64,
        apart=("nerf_",),
        left_out="nerf_*: each patch is a row of its own there",
        slow=True,
    ),
    "Lumina 2": Reduced(lumina2),
    "Z-Image": Reduced(zimage),
    "Qwen-Image": Reduced(qwen),
    "HunyuanImage 2.1": Reduced(
        hunyuan_image, apart=("byt5_in.",), left_out="byt5_in: only texts with quotes reach it"
    ),
    "HiDream": Reduced(
        hidream, apart=(".experts.",), left_out="experts: each sees some tokens of all rows at once"
    ),
    "OmniGen 2": Reduced(
        omnigen2, apart=("ref_image_",), left_out="ref_image_*: only references reach them"
    ),
    "Kandinsky 5 image": Reduced(kandinsky5_image),
    "Cosmos Predict2": Reduced(cosmos_predict2),
    "HunyuanVideo": Reduced(hunyuan_video),
    "HunyuanVideo I2V": Reduced(hunyuan_video_i2v, slow=True),
    "HunyuanVideo 1.5": Reduced(
        hunyuan_video15,
        apart=("byt5_in.", "vision_in."),
        left_out="byt5_in: only texts with quotes reach it; vision_in: only pictures do",
    ),
    "Wan 2.1 T2V": Reduced(wan),
    "Wan 2.1 I2V": Reduced(wan_i2v, apart=("img_emb.",), left_out="img_emb: pictures reach it"),
    "Wan 2.2 5B": Reduced(wan22_5b, slow=True),
    "LTX-Video": Reduced(ltxv),
    "Mochi": Reduced(mochi),
    "Kandinsky 5 video": Reduced(kandinsky5_video, slow=True),
}
