"""DoRA: a change with a magnitude per row or column of the weight, folded with the base."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LoraFileError


def fold_magnitude(change: Tensor, weight: Tensor, magnitude: Tensor, place: str) -> Tensor:
    """W' − W with W' = m · (W + ΔW) / ‖W + ΔW‖; ``change`` and ``weight`` are (out, in·kh·kw).

    The shape of ``magnitude`` tells the axis: (out,), (out, 1, …) and (1, out, 1, 1) as peft saves
    convolutions, norms over everything but the outputs; (1, in, 1, …) as LyCORIS and kohya save by
    default, over everything but the inputs. Where out = in, a leading 1 with two dimensions or more
    means the inputs, as in ComfyUI (``weight_adapter/base.py``, ``weight_decompose``). Source of
    the formula: arXiv 2402.09353, eq. 5.
    """
    scale = magnitude.float()
    moved = weight + change
    size = scale.numel()
    outputs, width = moved.shape
    on_inputs = scale.ndim >= 2 and scale.shape[0] == 1 and size != 1 and width % size == 0
    if on_inputs and scale.shape[1] != size:
        on_inputs = False
    if on_inputs:
        cube = moved.reshape(outputs, size, width // size)
        norm = cube.norm(dim=(0, 2)).reshape(1, size, 1)
        new = (cube * (scale.reshape(1, size, 1) / (norm + _eps()))).reshape(outputs, width)
    elif size == outputs:
        norm = moved.norm(dim=1, keepdim=True)
        new = moved * (scale.reshape(outputs, 1) / (norm + _eps()))
    else:
        raise LoraFileError(
            f"{place}: the magnitude of this DoRA has shape {tuple(scale.shape)}, but the base "
            f"model's weight there is {outputs} × {width}; it was made for another base model."
        )
    return new - weight


def _eps() -> float:
    return torch.finfo(torch.float32).eps
