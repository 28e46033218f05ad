"""DoRA: a change with a magnitude per row or column of the weight, folded with the base."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import LoraFileError


def fold_magnitude(
    change: Tensor, weight: Tensor, parts: Mapping[str, Tensor], place: str
) -> Tensor:
    """W' − W with W' = m · (W + ΔW) / ‖W + ΔW‖; ``change`` and ``weight`` are (out, in·kh·kw).

    m is the part ``output_magnitude`` (peft's ``lora_magnitude_vector``; one number an output, the
    norms over everything else) or ``magnitude`` (``dora_scale`` of LyCORIS and kohya; its shape
    tells the axis: (out, 1, …) outputs, (1, in, …) inputs). Source: arXiv 2402.09353, eq. 5.
    """
    moved = weight + change
    outputs, width = moved.shape
    own = parts.get("output_magnitude")
    scale = (parts["magnitude"] if own is None else own).float()
    size = scale.numel()
    if own is None and scale.ndim >= 2 and scale.shape[0] == 1 and outputs > 1:
        if size != scale.shape[1] or width % size:
            raise _misfit(scale, moved, place)
        cube = moved.reshape(outputs, size, width // size)
        norm = cube.norm(dim=(0, 2)).reshape(1, size, 1)
        new = (cube * (scale.reshape(1, size, 1) / (norm + _eps()))).reshape(outputs, width)
    elif size == outputs:
        norm = moved.norm(dim=1, keepdim=True)
        new = moved * (scale.reshape(outputs, 1) / (norm + _eps()))
    else:
        raise _misfit(scale, moved, place)
    return new - weight


def _misfit(scale: Tensor, weight: Tensor, place: str) -> LoraFileError:
    return LoraFileError(
        f"{place}: the magnitude of this DoRA has shape {tuple(scale.shape)}, but the base model's "
        f"weight there is {tuple(weight.shape)}; it was made for another base model."
    )


def _eps() -> float:
    return torch.finfo(torch.float32).eps
