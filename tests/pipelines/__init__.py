"""Reduced pipelines of diffusers: real classes, a few thousand random weights, no download."""

from collections.abc import Callable

from .flux import FLUX
from .loras import applied, loaded, lora_tensors, two_concepts, write_lora
from .modular import MODULAR
from .pictures import PICTURES
from .reduced import PROMPTS, Reduced, draw, seeded
from .sounds import SOUNDS
from .stable_diffusion import STABLE_DIFFUSION
from .videos import VIDEOS

PIPELINES: dict[str, Callable[[], Reduced]] = {
    name: seeded(make)
    for name, make in (STABLE_DIFFUSION | FLUX | PICTURES | VIDEOS | SOUNDS | MODULAR).items()
}

__all__ = [
    "PIPELINES",
    "PROMPTS",
    "Reduced",
    "applied",
    "draw",
    "loaded",
    "lora_tensors",
    "two_concepts",
    "write_lora",
]
