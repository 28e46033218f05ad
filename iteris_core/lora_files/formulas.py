"""Formulas for changes that do not depend on the base's weight: LoRA, LoCon, LoHa, LoKr, full
differences.

LoRA, LoCon with and without ``mid`` and most LoHa and LoKr are low rank exactly, and stay factors:

* ``mid`` (Tucker): ΔW[o, :, h, w] = Σ up[o, p] mid[p, q, h, w] down[q, :], rank as up's.
* LoHa: (A₁B₁) ⊙ (A₂B₂) = (A₁ ⊙row A₂)(B₁ ⊙col B₂), of rank r₁ r₂ (Khatri-Rao products).
* LoKr: (A₁B₁) ⊗ (A₂B₂) = (A₁ ⊗ A₂)(B₁ ⊗ B₂), of rank r₁ r₂; a factor in full counts its short side.

Where that rank is no saving, and for full differences, the change is dense. Formulas as in
LyCORIS 4 (``lycoris/functional``) and ComfyUI 0.8 (``comfy/weight_adapter``), which tests compare.
Each takes parts in float32, the weight's shape and the scale at a rank, and raises
:class:`Misfit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .factors import Factors

Parts = Mapping[str, Tensor]
Shape = tuple[int, ...]
ScaleAt = Callable[[int], float]

Rebuilt = Factors | Tensor
"""ΔW as factors, or in full, (out, in·kh·kw), float32, if factors would save nothing."""


class Misfit(Exception):
    """Parts do not match each other or the weight."""


def require(fits: bool) -> None:
    if not fits:
        raise Misfit


def _squeezed(shape: Shape) -> list[int]:
    """Out and in, and a kernel unless it is 1 × 1."""
    kernel = [] if all(size == 1 for size in shape[2:]) else list(shape[2:])
    return [*shape[:2], *kernel]


def difference(parts: Parts, shape: Shape, scale: ScaleAt) -> Rebuilt:
    require(_squeezed(parts["diff"].shape) == _squeezed(shape))
    return parts["diff"].reshape(shape).flatten(1)


def lora(parts: Parts, shape: Shape, scale: ScaleAt) -> Rebuilt:
    up, down, mid = parts["up"], parts["down"], parts.get("mid")
    require(up.ndim >= 2 and down.ndim >= 2)
    rank, inner = down.shape[0], up.shape[1]
    kernel = _squeezed(shape)[2:] if mid is None else []
    require(
        _squeezed(up.shape) == [shape[0], inner]
        and _squeezed(down.shape) == [rank, shape[1], *kernel]
        and (inner == rank if mid is None else mid.shape == (inner, rank, *shape[2:]))
    )
    up, down = up.flatten(1), down.flatten(1)
    if mid is not None:
        down = torch.einsum("pqhw,qi->pihw", mid, down).flatten(1)
    return Factors(up, down, scale(rank))


LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


def loha(parts: Parts, shape: Shape, scale: ScaleAt) -> Rebuilt:
    a1, b1, a2, b2 = (parts[name] for name in sorted(LOHA))
    require(all(factor.ndim == 2 for factor in (a1, b1, a2, b2)))
    factor = scale(len(b1))
    if "hada_t1" in parts:
        left = _tucker(parts["hada_t1"], a1, b1, shape)
        return (left * _tucker(parts["hada_t2"], a2, b2, shape)).flatten(1) * factor
    ranks, width = (len(b1), len(b2)), math.prod(shape[1:])
    require(
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
    require(
        t.ndim == 4
        and t.shape[:2] == (len(a), len(b))
        and (a.shape[1], b.shape[1], *t.shape[2:]) == shape
    )
    return torch.einsum("ijhw,ip,jr->prhw", t, a, b)


def is_whole_lokr(parts: Parts) -> bool:
    """True if both factors are present, each in full or as two halves."""
    counts = [
        (f"lokr_{end}" in parts, sum(f"lokr_{end}_{half}" in parts for half in "ab"))
        for end in ("w1", "w2")
    ]
    return all(count in ((True, 0), (False, 2)) for count in counts)


def lokr(parts: Parts, shape: Shape, scale: ScaleAt) -> Rebuilt:
    require(all(t.ndim == 2 or (t.ndim == 4 and "w1" not in n) for n, t in parts.items()))
    rank = next((len(parts[n]) for n in ("lokr_w2_b", "lokr_w1_b") if n in parts), 0)
    factor = scale(rank) if rank else 1.0
    left, right = _kronecker(parts, "w1"), _kronecker(parts, "w2")
    product = len(left[0]) * len(right[0]), left[-1].shape[1] * right[-1].shape[1]
    require(product == (shape[0], math.prod(shape[1:])))
    if len(right) == 2:
        a1, b1 = left if len(left) == 2 else _split(left[0])
        if a1.shape[1] * right[0].shape[1] < min(product):
            return Factors(torch.kron(a1, right[0]), torch.kron(b1, right[1]), factor)
    dense = [half[0] if len(half) == 1 else half[0] @ half[1] for half in (left, right)]
    return torch.kron(*dense) * factor


def _kronecker(parts: Parts, end: str) -> tuple[Tensor] | tuple[Tensor, Tensor]:
    """A factor of a Kronecker product: in full, or itself a product; kernels flattened."""
    if f"lokr_{end}" in parts:
        return (parts[f"lokr_{end}"].flatten(1),)
    a, b = parts[f"lokr_{end}_a"], parts[f"lokr_{end}_b"]
    require(a.ndim == 2)
    if "lokr_t2" in parts and end == "w2":
        require(b.ndim == 2)
        t = parts["lokr_t2"]
        return (_tucker(t, a, b, (a.shape[1], b.shape[1], *t.shape[2:])).flatten(1),)
    require(a.shape[1] == len(b))
    return a, b.flatten(1)


def _split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix`` as a product with the identity on its short side."""
    if matrix.shape[0] <= matrix.shape[1]:
        return torch.eye(matrix.shape[0]), matrix
    return matrix, torch.eye(matrix.shape[1])
