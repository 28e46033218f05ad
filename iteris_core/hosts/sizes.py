"""The size of the pictures on which features are collected: one rule for every host.

A picture has as many tokens as the least squares want, and never more than the model's own. They
are counted at the transformer block in the middle of all: of a transformer at its patches, of a
UNet at the level where half of its blocks see more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import nn

PICTURE_TOKENS = 1024
"""The tokens of 512 pixels on SD 1.5 and FLUX.1, and of 1024 on SDXL. With the default number of
rows that is a hundred tokens and more for every input of the widest site."""

MOST_PIXELS = 1024
"""The longest side, where a model compresses so much that fewer tokens are a picture already."""

FRAMES = 9
"""The frames of a video, unless the calibration says: two or three frames of latents."""


def default_size(
    scale: int, patch: int, own: tuple[int, int] | None = None, multiple: int = 1
) -> tuple[int, int]:
    """(height, width) in latents, at the ratio of the model's ``own`` size (None: a square).

    ``scale`` is how many pixels a side of a latent covers, ``patch`` how many latents a side of a
    token covers at the block in the middle. Sides are multiples of ``multiple`` and ``patch``.
    """
    height, width = own or (MOST_PIXELS // scale,) * 2
    shrink = math.sqrt(PICTURE_TOKENS * patch**2 / (height * width))
    shrink = min(shrink, MOST_PIXELS / (scale * max(height, width)), 1.0)
    step = math.lcm(patch, multiple)
    sides = (max(step, int(side * shrink / step + 1e-6) * step) for side in (height, width))
    return next(sides), next(sides)


def unet_levels(blocks: Iterable[nn.Module | None]) -> list[int]:
    """The latents that a side of a token covers in each transformer block of a UNet, whose
    ``blocks`` come in the order in which they run."""
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
    """The ``patch`` of :func:`default_size`; ``sides`` has for each transformer block, or for all,
    how many latents a side of its tokens covers."""
    return sorted(sides)[len(sides) // 2]
