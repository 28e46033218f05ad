"""Weight changes from the tensors of one module, for every parametrisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoraFileError
from .formulas import FORMULAS, Misfit, Module, Parts, Rebuilt
from .parts import modules_of

_BESIDE = {"alpha", "magnitude", "output_magnitude"}
"""Parts beside those that form the change: its scale and magnitudes."""


def rebuild(
    parts: Parts,
    shape: tuple[int, ...],
    scale: float | None,
    place: str,
    weight: Callable[[], Tensor],
) -> Rebuilt:
    """The change of a weight of ``shape``.

    ``scale`` comes from an adapter's configuration, if there is one; an ``alpha`` among the parts
    overrides it. ``weight`` returns the base's weight, (out, in·kh·kw), and is called only if the
    change depends on it. Raises :class:`LoraFileError`, starting with ``place``, if parts are
    missing or do not fit.
    """
    _check_parts(parts, place)
    floats = {name: _as_float(parts[name], name, place) for name in sorted(parts.keys() - _BESIDE)}
    try:
        module = Module(floats, shape, _alpha(parts, place), scale, weight)
        change = FORMULAS[frozenset(floats)](module)
    except Misfit:
        sizes = " and ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in floats.items())
        raise LoraFileError(
            f"{place} has {sizes}, but the base model's weight there is {tuple(shape)}; this LoRA "
            "was made for another base model."
        ) from None
    if parts.keys() <= floats.keys() | {"alpha"}:
        return change
    dense = change if isinstance(change, Tensor) else change.dense()
    return _fold_magnitude(dense, weight(), parts, place)


def check_whole(path: Path, keys: Iterable[str]) -> None:
    """Raise :class:`LoraFileError` for a module of the file ``path`` with missing parts."""
    for name, parts in modules_of(keys).items():
        if parts.keys() - _BESIDE:
            _check_parts(parts, f"{path}: {name}")


def _check_parts(parts: Collection[str], place: str) -> None:
    """Raise :class:`LoraFileError`, starting with ``place``, if a module has only these parts."""
    if frozenset(parts) - _BESIDE not in FORMULAS:
        raise LoraFileError(
            f"{place} has only the parts {', '.join(sorted(parts))}, which are not a complete "
            "change; its other half is missing. Save or download the file again."
        )


def _alpha(parts: Parts, place: str) -> float | None:
    if "alpha" not in parts:
        return None
    if parts["alpha"].numel() != 1:
        shape = tuple(parts["alpha"].shape)
        raise LoraFileError(f"{place}: alpha has shape {shape}, not one value.")
    alpha = float(parts["alpha"])
    if not math.isfinite(alpha):
        raise LoraFileError(f"{place}: alpha is {alpha}; the file is broken.")
    return alpha


def _as_float(tensor: Tensor, name: str, place: str) -> Tensor:
    if not tensor.is_floating_point():
        raise LoraFileError(f"{place}: {name} has dtype {tensor.dtype}, not floating point.")
    if tensor.numel() == 0:
        raise LoraFileError(
            f"{place}: {name} is empty, {tuple(tensor.shape)}: rank 0; the file is broken."
        )
    return tensor.float()


def _fold_magnitude(change: Tensor, weight: Tensor, parts: Parts, place: str) -> Tensor:
    """W' − W for DoRA, W' = m · (W + ΔW) / ‖W + ΔW‖; ``change``, ``weight`` are (out, in·kh·kw).

    m is the part ``output_magnitude`` (peft's ``lora_magnitude_vector``; one number per output, the
    norm over everything else) or ``magnitude`` (``dora_scale`` in LyCORIS and kohya; its shape
    gives the axis: (out, 1, …) outputs, (1, in, …) inputs). Source: arXiv 2402.09353, eq. 5. Raises
    :class:`LoraFileError`, starting with ``place``, if it does not fit.
    """
    moved = weight + change
    outputs, width = moved.shape
    by_output = "output_magnitude" in parts
    scale = parts["output_magnitude" if by_output else "magnitude"].float()
    size = scale.numel()
    by_input = not by_output and scale.ndim >= 2 and scale.shape[0] == 1 and outputs > 1
    if (size != scale.shape[1] or width % size) if by_input else size != outputs:
        raise LoraFileError(
            f"{place}: the magnitude of this DoRA has shape {tuple(scale.shape)}, but the base "
            f"model's weight there is {tuple(moved.shape)}; it was made for another base model."
        )
    # (outputs, inputs, kernel), or (outputs, 1, all the rest)
    cube = moved.reshape(outputs, size if by_input else 1, -1)
    norm = cube.norm(dim=(0, 2) if by_input else (1, 2), keepdim=True)
    new = cube * (scale.reshape(norm.shape) / (norm + torch.finfo(torch.float32).eps))
    return new.reshape(outputs, width) - weight
