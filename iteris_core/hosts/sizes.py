"""The size of the images and videos of a merge's rows."""

from __future__ import annotations

import math

PICTURE_TOKENS = 1024
"""The tokens of 512 pixels on SD 1.5 and FLUX.1, and of 1024 on SDXL. With the default number of
rows this gives at least a hundred tokens per input of the widest site."""

MOST_PIXELS = 1024
"""The longest side, for models with such high compression that an image has fewer tokens."""

FRAMES = 9
"""Default frames of a video: two or three latent frames."""


def default_size(
    scale: int, patch: int, native: tuple[int, int] | None = None, multiple: int = 1
) -> tuple[int, int]:
    """(height, width) in latents, at the ratio of the model's ``native`` size (None: a square).

    ``scale`` is pixels per latent side; ``patch`` is latents per token side at the middle block,
    the larger median of all blocks. Sides are multiples of ``multiple`` and ``patch``.
    """
    height, width = native or (MOST_PIXELS // scale,) * 2
    shrink = math.sqrt(PICTURE_TOKENS * patch**2 / (height * width))
    shrink = min(shrink, MOST_PIXELS / (scale * max(height, width)), 1.0)
    step = math.lcm(patch, multiple)
    sides = (max(step, int(side * shrink / step + 1e-6) * step) for side in (height, width))
    return next(sides), next(sides)
