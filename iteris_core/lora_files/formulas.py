"""The change of a weight from the tensors of one module, by a formula for each parametrisation.

LoRA, LoCon with and without ``mid`` and most LoHa and LoKr are low rank exactly, and stay factors:

* ``mid`` (Tucker): ΔW[o, :, h, w] = Σ up[o, p] mid[p, q, h, w] down[q, :], rank as up's.
* LoHa: (A₁B₁) ⊙ (A₂B₂) = (A₁ ⊙row A₂)(B₁ ⊙col B₂), of rank r₁ r₂ (Khatri-Rao products).
* LoKr: (A₁B₁) ⊗ (A₂B₂) = (A₁ ⊗ A₂)(B₁ ⊗ B₂), of rank r₁ r₂; a factor in full counts its short side.

Where that rank is no saving, and for full differences, the change is dense. Formulas as in LyCORIS
4 (``lycoris/functional``) and ComfyUI 0.8 (``comfy/weight_adapter``), which tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoraFileError
from ..lora import LowRank
from .tensors import modules_of

Parts = Mapping[str, Tensor]

Rebuilt = LowRank | Tensor
"""ΔW as factors without a ``kernel``, or in full, (out, in·kh·kw), float32, if factors would save
nothing."""


Scale = Callable[[int], float]
"""The factor of a change from its rank: alpha / rank, or that of an adapter's configuration."""


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    """Out and in, and a kernel unless it is 1 × 1."""
    kernel = [] if all(size == 1 for size in shape[2:]) else list(shape[2:])
    return [*shape[:2], *kernel]


def _difference(parts: Parts, shape: tuple[int, ...], scale: Scale) -> Rebuilt | None:
    change = parts["diff"]
    fits = _squeezed(change.shape) == _squeezed(shape)
    return change.reshape(shape).flatten(1) if fits else None


def _lora(parts: Parts, shape: tuple[int, ...], scale: Scale) -> Rebuilt | None:
    up, down, mid = parts["up"], parts["down"], parts.get("mid")
    if min(up.ndim, down.ndim) < 2:
        return None
    rank, inner = down.shape[0], up.shape[1]
    kernel = _squeezed(shape)[2:] if mid is None else []
    if not (
        _squeezed(up.shape) == [shape[0], inner]
        and _squeezed(down.shape) == [rank, shape[1], *kernel]
        and (inner == rank if mid is None else mid.shape == (inner, rank, *shape[2:]))
    ):
        return None
    up, down = up.flatten(1), down.flatten(1)
    if mid is not None:
        down = torch.einsum("pqhw,qi->pihw", mid, down).flatten(1)
    return LowRank.folded(up, down, scale(rank))


def _loha(parts: Parts, shape: tuple[int, ...], scale: Scale) -> Rebuilt | None:
    a1, b1, a2, b2 = (parts[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    width = math.prod(shape[1:])
    for a, b in ((a1, b1), (a2, b2)):
        if a.ndim != 2 or b.shape != (a.shape[1], width) or len(a) != shape[0]:
            return None
    if len(b1) * len(b2) >= min(shape[0], width):
        return (a1 @ b1) * (a2 @ b2) * scale(len(b1))
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
    down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    return LowRank.folded(up, down, scale(len(b1)))


def _lokr(parts: Parts, shape: tuple[int, ...], scale: Scale) -> Rebuilt | None:
    if not all(t.ndim == 2 or (t.ndim == 4 and "w1" not in n) for n, t in parts.items()):
        return None
    rank = next((len(parts[n]) for n in ("lokr_w2_b", "lokr_w1_b") if n in parts), 0)
    factor = scale(rank) if rank else 1.0
    halves: list[tuple[Tensor, ...]] = []  # in full, or a product
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts:
            halves.append((parts[name].flatten(1),))
            continue
        a, b = parts[f"{name}_a"], parts[f"{name}_b"]
        if a.ndim != 2 or a.shape[1] != len(b):
            return None
        halves.append((a, b.flatten(1)))
    left, right = halves
    product = len(left[0]) * len(right[0]), left[-1].shape[1] * right[-1].shape[1]
    if product != (shape[0], math.prod(shape[1:])):
        return None
    if len(right) == 2:
        if len(left) == 1:
            full = LowRank.whole(left[0])
            left = full.up, full.down
        if left[0].shape[1] * right[0].shape[1] < min(product):
            up, down = torch.kron(left[0], right[0]), torch.kron(left[1], right[1])
            return LowRank.folded(up, down, factor)
    dense = [half[0] if len(half) == 1 else half[0] @ half[1] for half in (left, right)]
    return torch.kron(*dense) * factor


_OF_PARTS = (
    (_lora, ("up down", "up down mid")),
    (_difference, ("diff",)),
    (_loha, ("hada_w1_a hada_w1_b hada_w2_a hada_w2_b",)),
    (_lokr, tuple(
        f"{left} {right}"
        for left in ("lokr_w1", "lokr_w1_a lokr_w1_b")
        for right in ("lokr_w2", "lokr_w2_a lokr_w2_b")
    )),
)  # fmt: skip
FORMULAS: Mapping[frozenset[str], Callable[[Parts, tuple[int, ...], Scale], Rebuilt | None]] = {
    frozenset(parts.split()): formula for formula, choices in _OF_PARTS for parts in choices
}
"""Exactly these parts → the formula for them, None if they do not match each other or the
weight."""

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
    overrides it. ``weight`` returns the base's weight, (out, in·kh·kw), and is called only for a
    DoRA. Raises :class:`LoraFileError`, starting with ``place``, if parts are missing or do not
    fit.
    """
    _check_parts(parts, place)
    floats: Parts = {}
    for name in sorted(parts.keys() - _BESIDE):
        part = parts[name]
        if not part.is_floating_point():
            raise LoraFileError(f"{place}: {name} has dtype {part.dtype}, not floating point.")
        if part.numel() == 0:
            raise LoraFileError(
                f"{place}: {name} is empty, {tuple(part.shape)}: rank 0; the file is broken."
            )
        floats[name] = part.float()
    alpha = None
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            sizes = tuple(parts["alpha"].shape)
            raise LoraFileError(f"{place}: alpha has shape {sizes}, not one value.")
        alpha = float(parts["alpha"])
    default, formula = 1.0 if scale is None else scale, FORMULAS[frozenset(floats)]
    change = formula(floats, shape, lambda rank: default if alpha is None else alpha / rank)
    if change is None:
        sizes = " and ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in floats.items())
        raise LoraFileError(
            f"{place} was made for another base: it has {sizes}, and this base's layer takes "
            f"{math.prod(shape[1:])} inputs and gives {shape[0]} outputs."
        )
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
