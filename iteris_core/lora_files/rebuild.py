"""Weight changes from the tensors of one module, for every parametrisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ..errors import LoraFileError
from .formulas import (
    LOHA,
    Misfit,
    Parts,
    Rebuilt,
    ScaleAt,
    Shape,
    difference,
    is_whole_lokr,
    loha,
    lokr,
    lora,
)
from .of_weight import GLORA, fold_magnitude, glora, rotation
from .parts import split_key

_MAGNITUDES = {"magnitude", "output_magnitude"}


def rebuild(
    parts: Parts, shape: Shape, scale: float | None, place: str, weight: Callable[[], Tensor]
) -> Rebuilt:
    """The change of a weight of ``shape``.

    ``scale`` comes from an adapter's configuration, if there is one; an ``alpha`` among the parts
    overrides it. ``weight`` returns the base's weight, (out, in·kh·kw), and is called only if the
    change depends on it. Raises :class:`LoraFileError`, starting with ``place``, if parts are
    missing or do not fit.
    """
    floats = {name: _as_float(parts[name], name, place) for name in _factors(parts)}
    build = _formula(floats, place, parts, weight)
    try:
        change = build(floats, shape, lambda rank: _scale(parts, scale, rank, place))
    except Misfit:
        sizes = " and ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in floats.items())
        raise LoraFileError(
            f"{place} has {sizes}, but the base model's weight there is {tuple(shape)}; this LoRA "
            "was made for another base model."
        ) from None
    if not parts.keys() & _MAGNITUDES:
        return change
    dense = change if isinstance(change, Tensor) else change.dense()
    return fold_magnitude(dense, weight(), parts, place)


def check_whole(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise :class:`LoraFileError` for a module of the file ``path`` with missing parts."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        split = split_key(key, ())
        if split is not None:
            modules.setdefault(split[0], {})[split[1]] = tensor
    for name, parts in modules.items():
        if factors := {part: parts[part] for part in _factors(parts)}:
            _formula(factors, f"{path}: {name}", parts, Tensor)


def _factors(parts: Parts) -> list[str]:
    """The parts that form the change, without its scale and magnitudes."""
    return sorted(set(parts) - {"alpha"} - _MAGNITUDES)


def _formula(
    floats: Parts, place: str, parts: Parts, weight: Callable[[], Tensor]
) -> Callable[[Parts, Shape, ScaleAt], Rebuilt]:
    """The formula for exactly these parts."""
    names = set(floats)
    if names in ({"down", "up"}, {"down", "mid", "up"}):
        return lora
    if names == {"diff"}:
        return difference
    if names in (LOHA, LOHA | {"hada_t1", "hada_t2"}):
        return loha
    if names and all(name.startswith("lokr_") for name in names) and is_whole_lokr(floats):
        return lokr
    if names in ({"oft_blocks"}, {"oft_blocks", "rescale"}):
        return lambda f, shape, scale: rotation(f, weight(), _alpha(parts, place) or 0.0)
    if names == GLORA:
        return lambda f, shape, scale: glora(f, shape, scale, weight())
    raise LoraFileError(
        f"{place} has only the parts {', '.join(sorted(parts))}, which are not a complete change; "
        "its other half is missing. Save or download the file again."
    )


def _scale(parts: Parts, configured: float | None, rank: int, place: str) -> float:
    """alpha / rank, or the scale from the configuration."""
    alpha = _alpha(parts, place)
    if alpha is None:
        return 1.0 if configured is None else configured
    return alpha / rank


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
