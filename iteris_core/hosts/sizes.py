"""The size of the images and videos of a merge's rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import nn

PICTURE_TOKENS = 1024
"""The tokens of 512 pixels on SD 1.5 and FLUX.1, and of 1024 on SDXL. With the default number of
rows this gives at least a hundred tokens per input of the widest site."""

MOST_PIXELS = 1024
"""The longest side, for models with such high compression that an image has fewer tokens."""

FRAMES = 9
"""Default frames of a video: two or three latent frames."""


def default_size(
    scale: int, patch: int, own: tuple[int, int] | None = None, multiple: int = 1
) -> tuple[int, int]:
    """(height, width) in latents, at the ratio of the model's ``own`` size (None: a square).

    ``scale`` is pixels per latent side; ``patch`` is latents per token side at the middle block.
    Sides are multiples of ``multiple`` and ``patch``.
    """
    height, width = own or (MOST_PIXELS // scale,) * 2
    shrink = math.sqrt(PICTURE_TOKENS * patch**2 / (height * width))
    shrink = min(shrink, MOST_PIXELS / (scale * max(height, width)), 1.0)
    step = math.lcm(patch, multiple)
    sides = (max(step, int(side * shrink / step + 1e-6) * step) for side in (height, width))
    return next(sides), next(sides)


def unet_levels(blocks: Iterable[nn.Module | None]) -> list[int]:
    """Latents per token side in each transformer block of a UNet's ``blocks``, in their order."""
    levels: list[int] = []
    level = 1
    for module in (module for block in blocks if block is not None for module in block.modules()):
        kind = type(module).__name__
        if kind == "BasicTransformerBlock":
            levels.append(level)
        elif kind.startswith("Downsample"):
            level *= 2
        elif kind.startswith("Upsample"):
            level //= 2
    return levels


def middle_patch(sides: Sequence[int]) -> int:
    """The ``patch`` of :func:`default_size`, from the sides of tokens in every block, or in all."""
    return sorted(sides)[len(sides) // 2]
