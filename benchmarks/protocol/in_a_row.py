"""Several concepts in a row, each region denoised by what belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from iteris_core import Lora

Part = tuple[Lora | None, Sequence[str]]
"""What denoises a region of the pictures: a LoRA, and a prompt for each picture."""


def by_windows(
    sample: Tensor, axis: int, width: int, denoise: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """What ``denoise``, called with a region's number and a window, predicts of ``sample``.

    Regions lie side by side along ``axis``, half a ``width`` each. A window is as wide as the
    model's own pictures, ``width``, and holds two neighbours, of which each has its prediction from
    its own call; what two windows say of one region is averaged, as in MultiDiffusion (Bar-Tal et
    al. 2023, equation 5). Two regions have one window, which is the whole picture.
    """
    half = width // 2
    regions = sample.shape[axis] // half
    found = torch.zeros_like(sample)
    for start in range(regions - 1):
        window = sample.narrow(axis, start * half, width)
        for place in (0, 1):
            predicted = denoise(start + place, window).narrow(axis, place * half, half)
            found.narrow(axis, (start + place) * half, half).add_(predicted)
    found.narrow(axis, half, (regions - 2) * half).div_(2)
    return found


def ring(names: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """Each ``count`` neighbours, those across the end as well."""
    twice = [*names, *names]
    return [tuple(twice[start : start + count]) for start in range(len(names))]
