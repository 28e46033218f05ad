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
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoraFileError

Parts = Mapping[str, Tensor]
_ScaleAt = Callable[[int], float]


@dataclass(frozen=True)
class Factors:
    """ΔW = ``scale`` · ``up @ down``: up (out, rank), down (rank, in·kh·kw), float32."""

    up: Tensor
    down: Tensor
    scale: float

    def matrix(self) -> Tensor:
        """ΔW, (out, in·kh·kw)."""
        return (self.up @ self.down) * self.scale


@dataclass(frozen=True)
class Dense:
    """ΔW, (out, in·kh·kw), float32, where factors would be no saving."""

    change: Tensor

    def matrix(self) -> Tensor:
        """ΔW."""
        return self.change


Rebuilt = Factors | Dense


def rebuild(parts: Parts, shape: tuple[int, ...], scale: float | None, place: str) -> Rebuilt:
    """The change of a weight of ``shape`` (without the magnitude of a DoRA).

    ``scale`` is what an adapter's configuration says, if there is one; an ``alpha`` among the parts
    goes before it. Raises :class:`LoraFileError`, beginning with ``place``, where parts are missing
    or do not fit.
    """
    names = set(parts) - {"alpha", "magnitude", "output_magnitude"}
    floats = {name: _as_float(parts[name], name, place) for name in names}

    def scale_at(rank: int) -> float:
        return _scale(parts, scale, rank, place)

    if names in ({"down", "up"}, {"down", "up", "mid"}):
        return _lora(floats, shape, scale_at, place)
    if names == {"diff"}:
        return Dense(_fit(floats["diff"], shape, "diff", place).flatten(1))
    hada = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    if names in (hada, hada | {"hada_t1", "hada_t2"}):
        return _loha(floats, shape, scale_at, place)
    if names and all(name.startswith("lokr_") for name in names):
        return _lokr(floats, shape, scale_at, place)
    raise LoraFileError(
        f"{place} has only the parts {', '.join(sorted(parts))}, which make no whole change; its "
        "other half is missing. Save or download the file again."
    )


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


def _fit(tensor: Tensor, shape: tuple[int, ...], what: str, place: str) -> Tensor:
    """``tensor`` in ``shape`` where only dimensions of size 1 differ."""
    if _squeezed(tensor.shape) != _squeezed(shape):
        raise _misfit(place, shape, **{what: tensor})
    return tensor.reshape(shape)


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    """Out and in, and a kernel unless it is 1 × 1."""
    kernel = [] if all(size == 1 for size in shape[2:]) else list(shape[2:])
    return [*shape[:2], *kernel]


def _misfit(place: str, shape: tuple[int, ...], **tensors: Tensor) -> LoraFileError:
    sizes = " and ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return LoraFileError(
        f"{place} has {sizes}, but the base model's weight there is {tuple(shape)}; this LoRA was "
        "made for another base model."
    )


def _lora(parts: Parts, shape: tuple[int, ...], scale: _ScaleAt, place: str) -> Rebuilt:
    up, down, mid = parts["up"], parts["down"], parts.get("mid")
    rank = down.shape[0]
    fits = (
        up.ndim >= 2
        and down.ndim >= 2
        and _squeezed(up.shape) == [shape[0], up.shape[1]]
        and down.shape[1] == shape[1]
    )
    if mid is None:
        fits = fits and up.shape[1] == rank and _squeezed(down.shape)[2:] == _squeezed(shape)[2:]
    else:
        fits = (
            fits
            and _squeezed(down.shape) == [rank, shape[1]]
            and tuple(mid.shape) == (up.shape[1], rank, *shape[2:])
        )
    if not fits:
        tensors = {"down": down, "up": up} | ({} if mid is None else {"mid": mid})
        raise _misfit(place, shape, **tensors)
    up, down = up.flatten(1), down.flatten(1)
    if mid is not None:
        down = torch.einsum("pqhw,qi->pihw", mid, down).flatten(1)
    return Factors(up, down, scale(rank))


def _loha(parts: Parts, shape: tuple[int, ...], scale: _ScaleAt, place: str) -> Rebuilt:
    a1, b1, a2, b2 = (parts[f"hada_{n}"] for n in ("w1_a", "w1_b", "w2_a", "w2_b"))
    ranks = b1.shape[0], b2.shape[0]
    if any(factor.ndim != 2 for factor in (a1, b1, a2, b2)):
        raise _misfit(place, shape, w1_a=a1, w1_b=b1, w2_a=a2, w2_b=b2)
    if "hada_t1" in parts:
        halves = [
            _tucker(parts[f"hada_t{n}"], a, b, shape, place)
            for n, a, b in ((1, a1, b1), (2, a2, b2))
        ]
        return Dense((halves[0] * halves[1]).flatten(1) * scale(ranks[0]))
    width = math.prod(shape[1:])
    if (
        {a1.shape[0], a2.shape[0]} != {shape[0]}
        or {b1.shape[1], b2.shape[1]} != {width}
        or (a1.shape[1], a2.shape[1]) != ranks
    ):
        raise _misfit(place, shape, w1_a=a1, w1_b=b1, w2_a=a2, w2_b=b2)
    if ranks[0] * ranks[1] >= min(shape[0], width):
        return Dense((a1 @ b1) * (a2 @ b2) * scale(ranks[0]))
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
    down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    return Factors(up, down, scale(ranks[0]))


def _tucker(t: Tensor, a: Tensor, b: Tensor, shape: tuple[int, ...], place: str) -> Tensor:
    """Σ t[i, j, …] a[i, out] b[j, in], (out, in, kh, kw)."""
    if (
        t.ndim != 4
        or tuple(t.shape[:2]) != (a.shape[0], b.shape[0])
        or (a.shape[1], b.shape[1], *t.shape[2:]) != shape
    ):
        raise _misfit(place, shape, t=t, a=a, b=b)
    return torch.einsum("ijhw,ip,jr->prhw", t, a, b)


def _lokr(parts: Parts, shape: tuple[int, ...], scale: _ScaleAt, place: str) -> Rebuilt:
    for end in ("w1", "w2"):
        whole, halves = f"lokr_{end}" in parts, {f"lokr_{end}_a", f"lokr_{end}_b"} & set(parts)
        if whole == bool(halves) or (halves and len(halves) != 2):
            raise LoraFileError(
                f"{place} has only the parts {', '.join(sorted(parts))} of a LoKr; its other half "
                "is missing. Save or download the file again."
            )
    if any(p.ndim not in (2, 4) or (p.ndim == 4 and n in ("lokr_w1", "lokr_w1_a", "lokr_w1_b"))
           for n, p in parts.items()):  # fmt: skip
        raise _misfit(place, shape, **parts)
    rank = next((parts[f"lokr_{n}_b"].shape[0] for n in ("w2", "w1") if f"lokr_{n}_b" in parts), 0)
    factor = scale(rank) if rank else 1.0
    left, right = _halves(parts, "w1", place, shape), _halves(parts, "w2", place, shape)
    product = left[0].shape[0] * right[0].shape[0], left[-1].shape[1] * right[-1].shape[1]
    if product != (shape[0], math.prod(shape[1:])):
        raise _misfit(place, shape, **parts)
    if len(right) == 2:
        a1, b1 = left if len(left) == 2 else _split(left[0])
        if a1.shape[1] * right[0].shape[1] < min(product):
            return Factors(torch.kron(a1, right[0]), torch.kron(b1, right[1]), factor)
    return Dense(torch.kron(_product(left), _product(right)) * factor)


_Half = tuple[Tensor] | tuple[Tensor, Tensor]
"""A factor of a Kronecker product: in full, or as a product a @ b itself; kernels flattened."""


def _product(half: _Half) -> Tensor:
    return half[0] if len(half) == 1 else half[0] @ half[1]


def _halves(parts: Parts, end: str, place: str, shape: tuple[int, ...]) -> _Half:
    if f"lokr_{end}" in parts:
        return (parts[f"lokr_{end}"].flatten(1),)
    a, b = parts[f"lokr_{end}_a"], parts[f"lokr_{end}_b"]
    if "lokr_t2" in parts and end == "w2":
        if a.ndim != 2 or b.ndim != 2:
            raise _misfit(place, shape, w2_a=a, w2_b=b)
        t = parts["lokr_t2"]
        return (_tucker(t, a, b, (a.shape[1], b.shape[1], *t.shape[2:]), place).flatten(1),)
    if a.ndim != 2 or a.shape[1] != b.shape[0]:
        raise _misfit(place, shape, a=a, b=b)
    return a, b.flatten(1)


def _split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix`` as a product with the unit matrix of its short side."""
    if matrix.shape[0] <= matrix.shape[1]:
        return torch.eye(matrix.shape[0]), matrix
    return matrix, torch.eye(matrix.shape[1])
