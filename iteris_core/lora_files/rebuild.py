"""From the tensors of one module to its change of weight, for every parametrisation.

LoRA, LoCon with and without ``mid`` and most LoHa and LoKr are low rank exactly, and stay factors:

* ``mid`` (Tucker): ΔW[o, :, h, w] = Σ up[o, p] mid[p, q, h, w] down[q, :], rank as up's.
* LoHa: (A₁B₁) ⊙ (A₂B₂) = (A₁ ⊙row A₂)(B₁ ⊙col B₂), of rank r₁ r₂ (Khatri-Rao products).
* LoKr: (A₁B₁) ⊗ (A₂B₂) = (A₁ ⊗ A₂)(B₁ ⊗ B₂), of rank r₁ r₂; a factor in full counts its short side.

Where that rank is no saving, and for full differences, the change is dense. Formulas as in
LyCORIS 4 (``lycoris/functional``) and ComfyUI 0.8 (``comfy/weight_adapter``), which tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import LoraFileError
from .factors import Factors

Parts = Mapping[str, Tensor]
Shape = tuple[int, ...]
ScaleAt = Callable[[int], float]

Rebuilt = Factors | Tensor
"""ΔW as factors, or in full, (out, in·kh·kw), float32, where those would be no saving."""


class _Misfit(Exception):
    """Parts do not fit each other or the weight."""


def _require(fits: bool) -> None:
    if not fits:
        raise _Misfit


def rebuild(parts: Parts, shape: Shape, scale: float | None, place: str) -> Rebuilt:
    """The change of a weight of ``shape`` (without the magnitude of a DoRA).

    ``scale`` is what an adapter's configuration says, if there is one; an ``alpha`` among the parts
    goes before it. Raises :class:`LoraFileError`, beginning with ``place``, where parts are missing
    or do not fit.
    """
    names = sorted(set(parts) - {"alpha", "magnitude", "output_magnitude"})
    floats = {name: _as_float(parts[name], name, place) for name in names}
    if names in (["down", "up"], ["down", "mid", "up"]):
        build = _lora
    elif names == ["diff"]:
        build = _difference
    elif {n for n in names if n not in ("hada_t1", "hada_t2")} == _LOHA and len(names) != 5:
        build = _loha
    elif names and all(name.startswith("lokr_") for name in names) and _is_whole_lokr(floats):
        build = _lokr
    else:
        raise LoraFileError(
            f"{place} has only the parts {', '.join(sorted(parts))}, which make no whole change; "
            "its other half is missing. Save or download the file again."
        )
    try:
        return build(floats, shape, lambda rank: _scale(parts, scale, rank, place))
    except _Misfit:
        sizes = " and ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in floats.items())
        raise LoraFileError(
            f"{place} has {sizes}, but the base model's weight there is {tuple(shape)}; this LoRA "
            "was made for another base model."
        ) from None


def _scale(parts: Parts, configured: float | None, rank: int, place: str) -> float:
    """alpha / rank, or what the configuration says."""
    if "alpha" not in parts:
        return 1.0 if configured is None else configured
    if parts["alpha"].numel() != 1:
        shape = tuple(parts["alpha"].shape)
        raise LoraFileError(f"{place}: alpha has shape {shape}, not one value.")
    alpha = float(parts["alpha"])
    if not math.isfinite(alpha):
        raise LoraFileError(f"{place}: alpha is {alpha}; the file is broken.")
    return alpha / rank


def _as_float(tensor: Tensor, name: str, place: str) -> Tensor:
    if not tensor.is_floating_point():
        raise LoraFileError(f"{place}: {name} holds {tensor.dtype}, not floating-point numbers.")
    if tensor.numel() == 0:
        raise LoraFileError(
            f"{place}: {name} is empty, {tuple(tensor.shape)}: rank 0; the file is broken."
        )
    return tensor.float()


def _squeezed(shape: Shape) -> list[int]:
    """Out and in, and a kernel unless it is 1 × 1."""
    kernel = [] if all(size == 1 for size in shape[2:]) else list(shape[2:])
    return [*shape[:2], *kernel]


def _difference(parts: Parts, shape: Shape, scale: ScaleAt) -> Rebuilt:
    _require(_squeezed(parts["diff"].shape) == _squeezed(shape))
    return parts["diff"].reshape(shape).flatten(1)


def _lora(parts: Parts, shape: Shape, scale: ScaleAt) -> Rebuilt:
    up, down, mid = parts["up"], parts["down"], parts.get("mid")
    _require(up.ndim >= 2 and down.ndim >= 2)
    rank, inner = down.shape[0], up.shape[1]
    kernel = _squeezed(shape)[2:] if mid is None else []
    _require(
        _squeezed(up.shape) == [shape[0], inner]
        and _squeezed(down.shape) == [rank, shape[1], *kernel]
        and (inner == rank if mid is None else mid.shape == (inner, rank, *shape[2:]))
    )
    up, down = up.flatten(1), down.flatten(1)
    if mid is not None:
        down = torch.einsum("pqhw,qi->pihw", mid, down).flatten(1)
    return Factors(up, down, scale(rank))


_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


def _loha(parts: Parts, shape: Shape, scale: ScaleAt) -> Rebuilt:
    a1, b1, a2, b2 = (parts[name] for name in sorted(_LOHA))
    _require(all(factor.ndim == 2 for factor in (a1, b1, a2, b2)))
    factor = scale(len(b1))
    if "hada_t1" in parts:
        left = _tucker(parts["hada_t1"], a1, b1, shape)
        return (left * _tucker(parts["hada_t2"], a2, b2, shape)).flatten(1) * factor
    ranks, width = (len(b1), len(b2)), math.prod(shape[1:])
    _require(
        {len(a1), len(a2)} == {shape[0]}
        and {b1.shape[1], b2.shape[1]} == {width}
        and (a1.shape[1], a2.shape[1]) == ranks
    )
    if math.prod(ranks) >= min(shape[0], width):
        return (a1 @ b1) * (a2 @ b2) * factor
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
    down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    return Factors(up, down, factor)


def _tucker(t: Tensor, a: Tensor, b: Tensor, shape: Shape) -> Tensor:
    """Σ t[i, j, …] a[i, out] b[j, in], (out, in, kh, kw)."""
    _require(
        t.ndim == 4
        and t.shape[:2] == (len(a), len(b))
        and (a.shape[1], b.shape[1], *t.shape[2:]) == shape
    )
    return torch.einsum("ijhw,ip,jr->prhw", t, a, b)


def _is_whole_lokr(parts: Parts) -> bool:
    """Whether both factors are there, each in full or as two halves."""
    counts = [
        (f"lokr_{end}" in parts, sum(f"lokr_{end}_{half}" in parts for half in "ab"))
        for end in ("w1", "w2")
    ]
    return all(count in ((True, 0), (False, 2)) for count in counts)


def _lokr(parts: Parts, shape: Shape, scale: ScaleAt) -> Rebuilt:
    _require(all(t.ndim == 2 or (t.ndim == 4 and "w1" not in n) for n, t in parts.items()))
    rank = next((len(parts[n]) for n in ("lokr_w2_b", "lokr_w1_b") if n in parts), 0)
    factor = scale(rank) if rank else 1.0
    left, right = _kronecker(parts, "w1"), _kronecker(parts, "w2")
    product = len(left[0]) * len(right[0]), left[-1].shape[1] * right[-1].shape[1]
    _require(product == (shape[0], math.prod(shape[1:])))
    if len(right) == 2:
        a1, b1 = left if len(left) == 2 else _split(left[0])
        if a1.shape[1] * right[0].shape[1] < min(product):
            return Factors(torch.kron(a1, right[0]), torch.kron(b1, right[1]), factor)
    dense = [half[0] if len(half) == 1 else half[0] @ half[1] for half in (left, right)]
    return torch.kron(*dense) * factor


def _kronecker(parts: Parts, end: str) -> tuple[Tensor] | tuple[Tensor, Tensor]:
    """A factor of a Kronecker product: in full, or as a product itself; kernels flattened."""
    if f"lokr_{end}" in parts:
        return (parts[f"lokr_{end}"].flatten(1),)
    a, b = parts[f"lokr_{end}_a"], parts[f"lokr_{end}_b"]
    _require(a.ndim == 2)
    if "lokr_t2" in parts and end == "w2":
        _require(b.ndim == 2)
        t = parts["lokr_t2"]
        return (_tucker(t, a, b, (a.shape[1], b.shape[1], *t.shape[2:])).flatten(1),)
    _require(a.shape[1] == len(b))
    return a, b.flatten(1)


def _split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix`` as a product with the unit matrix of its short side."""
    if matrix.shape[0] <= matrix.shape[1]:
        return torch.eye(matrix.shape[0]), matrix
    return matrix, torch.eye(matrix.shape[1])


def fold_magnitude(change: Tensor, weight: Tensor, parts: Parts, place: str) -> Tensor:
    """W' − W of a DoRA, W' = m · (W + ΔW) / ‖W + ΔW‖; ``change``, ``weight`` are (out, in·kh·kw).

    m is the part ``output_magnitude`` (peft's ``lora_magnitude_vector``; one number an output, the
    norms over everything else) or ``magnitude`` (``dora_scale`` of LyCORIS and kohya; its shape
    tells the axis: (out, 1, …) outputs, (1, in, …) inputs). Source: arXiv 2402.09353, eq. 5.
    Raises :class:`LoraFileError`, beginning with ``place``, where it does not fit.
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
