"""ComfyUI's own classes at reduced widths, with random weights: every architecture in seconds.

ComfyUI tells architectures by their full widths, so no checkpoint of these can be detected; they
are made from its classes as its loader would make them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from . import references as given
from .flux import chroma, chroma_radiance, flux, flux2, flux_fill, flux_narrow, flux_schnell
from .later import anima, cogvideox, ernie_image, krea2, longcat_image
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
    """``side`` is that of its latents; ``entries`` are what it is given beside a text, ``settings``
    those of its merges. One with ``experts`` is a pair of models, for high and for low noise.
    ``apart`` are parts of the names of layers that cannot be merged, and ``left_out`` says why.
    Those that ``slow`` marks have a near relative that is not."""

    make: Callable[[], tuple[Any, Any]]
    side: int = 8
    video: bool = False
    experts: bool = False
    entries: Mapping[str, Any] = field(default_factory=dict[str, Any])
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    apart: tuple[str, ...] = ()
    left_out: str = ""
    slow: bool = False
    since: str = ""

    def skip_if_later(self) -> None:
        """Where this ComfyUI does not have it yet."""
        import comfy.supported_models

        if self.since and not hasattr(comfy.supported_models, self.since):
            pytest.skip(f"this ComfyUI has no {self.since}")


_FLATTENED = "its forward joins the rows of a batch to one"
_EVERY_CALL = {"schedule": "jacobi"}

ARCHITECTURES = {
    "SD 1.5": Reduced(sd15),
    "SD 1.5 inpainting": Reduced(sd15_inpainting, entries=given.inpainted(4), slow=True),
    "InstructPix2Pix": Reduced(sd15_instructpix2pix, entries=given.beside(4), slow=True),
    "SD 2": Reduced(sd2, slow=True),
    "SDXL": Reduced(sdxl_narrow),
    "SDXL inpainting": Reduced(sdxl_inpainting, entries=given.inpainted(4), slow=True),
    "SDXL refiner": Reduced(sdxl_refiner, slow=True),
    "Stable Cascade C": Reduced(cascade_c),
    "Stable Cascade B": Reduced(
        cascade_b, side=16, entries=given.prior(), settings=_EVERY_CALL, slow=True
    ),
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
    "FLUX.1 Kontext": Reduced(flux_narrow, entries=given.edited(16, 6, 6)),
    "FLUX.1 Fill": Reduced(flux_fill, entries=given.inpainted(16)),
    "FLUX.2": Reduced(flux2),
    "FLUX.2 with references": Reduced(flux2, entries=given.edited(128, 6, 6), slow=True),
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
    "Qwen-Image-Edit": Reduced(qwen, entries=given.edited(16, 1, 6, 6)),
    "HunyuanImage 2.1": Reduced(
        hunyuan_image, apart=("byt5_in.",), left_out="byt5_in: only texts with quotes reach it"
    ),
    "HiDream": Reduced(
        hidream, apart=(".experts.",), left_out="experts: each sees some tokens of all rows at once"
    ),
    "OmniGen 2": Reduced(omnigen2, entries=given.edited(16, 6, 6)),
    "Kandinsky 5 image": Reduced(kandinsky5_image),
    "Cosmos Predict2": Reduced(cosmos_predict2),
    "HunyuanVideo": Reduced(hunyuan_video, video=True),
    "HunyuanVideo I2V": Reduced(
        hunyuan_video_i2v, video=True, entries=given.first_frame(16, 3), slow=True
    ),
    "HunyuanVideo 1.5 I2V": Reduced(
        hunyuan_video15,
        video=True,
        entries={**given.first_frame(32, 3), **given.seen(64)},
        apart=("byt5_in.",),
        left_out="byt5_in: only texts with quotes reach it",
    ),
    "Wan 2.1 T2V": Reduced(wan, video=True),
    "Wan 2.1 I2V": Reduced(
        wan_i2v, video=True, entries={**given.first_frame(16, 3), **given.seen(1280)}
    ),
    "Wan 2.2 14B": Reduced(wan, video=True, experts=True),
    "Wan 2.2 5B": Reduced(wan22_5b, video=True, slow=True),
    "LTX-Video": Reduced(ltxv, video=True),
    "Mochi": Reduced(mochi, video=True),
    "Kandinsky 5 video": Reduced(kandinsky5_video, video=True, slow=True),
}
LATER = {
    "LongCat-Image": Reduced(longcat_image, since="LongCatImage"),
    "ERNIE-Image": Reduced(ernie_image, since="ErnieImage"),
    "Krea 2": Reduced(
        krea2,
        apart=("txtfusion.layerwise_blocks.",),
        left_out="txtfusion.layerwise_blocks: each layer of the text is a row of its own there",
        since="Krea2",
    ),
    "Anima": Reduced(anima, slow=True, since="Anima"),
    "CogVideoX": Reduced(cogvideox, video=True, since="CogVideoX_T2V"),
}
"""Of later versions of ComfyUI; ``since`` is the class that has to be there."""
ARCHITECTURES |= LATER
