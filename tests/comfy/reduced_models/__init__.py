"""ComfyUI's own classes at reduced widths, with random weights: every architecture in seconds.

ComfyUI tells architectures by their full widths, so no checkpoint of these can be detected; they
are made from its classes as its loader would make them. One that this ComfyUI does not have skips
its test.
"""

from .cosmos import COSMOS, anima
from .dits import DITS
from .flux import FLUX, flux, flux2
from .later import LATER, krea2, minimax_h3
from .parts import write_lora
from .pictures import PICTURES, qwen, zimage
from .reduced import Reduced
from .sounds import SOUNDS
from .unets import UNETS, sd15, sdxl, svd
from .videos import VIDEOS
from .wan import WAN, wan

__all__ = [
    "ARCHITECTURES",
    "Reduced",
    "anima",
    "flux",
    "flux2",
    "krea2",
    "minimax_h3",
    "qwen",
    "sd15",
    "sdxl",
    "svd",
    "wan",
    "write_lora",
    "zimage",
]

ARCHITECTURES = UNETS | DITS | FLUX | PICTURES | LATER | COSMOS | VIDEOS | WAN | SOUNDS
