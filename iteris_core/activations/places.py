"""Which column of a picture the parts of a tensor belong to."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def compose_halves(
    left: Tensor, right: Tensor, picture: Sequence[int] | None, patches: Sequence[int]
) -> Tensor | None:
    """The left half of ``left`` beside the right half of ``right``, two tensors of one shape.

    They are (rows, channels, …, height, width), or (rows, tokens, channels) with a token for each
    patch of a ``picture`` of (…, height, width), in reading order. A side of a patch is one of
    ``patches``. None where neither is so.
    """
    first = _in_left_half(left, picture, patches)
    return None if first is None else torch.where(first, left, right)


def _in_left_half(
    tensor: Tensor, picture: Sequence[int] | None, patches: Sequence[int]
) -> Tensor | None:
    if tensor.ndim >= 4:
        width = tensor.shape[-1]
        return torch.arange(width, device=tensor.device) < width / 2
    if tensor.ndim != 3 or picture is None:
        return None
    *others, height, width = picture
    for patch in patches:
        rows, columns = height // patch, width // patch
        if rows * columns * prod(others) == tensor.shape[1]:
            column = torch.arange(tensor.shape[1], device=tensor.device) % columns
            return (column < columns / 2)[:, None]
    return None
