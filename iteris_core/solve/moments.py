"""Second moments of one site, streamed: everything that :mod:`.solve` needs to know of the inputs.

Rows are tokens, as in PyTorch; every function adds to what is there, so tokens may arrive in any
number of pieces. Statistics are kept in one dtype (float32 unless the caller says float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lora import LowRank


@dataclass
class InputMoments:
    """What several sites share when they receive the same tensor, one concept's part of it.

    ``own`` is X̃ᵀX̃ and ``cross`` is XᵀX̃, both (in, in); ``cross`` is only kept for
    ``align="adapter"``. ``tokens`` counts rows. While tokens are added only the upper block
    triangle of ``own`` is right (``whole`` is False); :func:`complete` mirrors it.
    """

    own: Tensor
    cross: Tensor | None
    tokens: int = 0
    whole: bool = True


@dataclass(frozen=True)
class Directions:
    """Orthonormal columns of a site's outputs, (out, k + q): ``used`` of them, k, are what a change
    may be made of, and the other q, at random, tell about how much the rest of the outputs holds.
    """

    matrix: Tensor
    used: int

    @property
    def basis(self) -> Tensor:
        """(out, k)"""
        return self.matrix[:, : self.used]

    @property
    def others_stand_for(self) -> float:
        """How many directions each of the others stands for."""
        out, count = self.matrix.shape
        return (out - self.used) / max(count - self.used, 1)


@dataclass
class TargetMoments:
    """What belongs to one site and one concept.

    ``target`` is TᵀX̃, (out, in), for ``align="full"``, or, with ``directions`` D, DᵀTᵀX̃,
    (k + q, in); ``down_gram`` is (X downᵀ)ᵀ(X downᵀ), (rank, rank), for a concept that changes the
    site; ``target_energy`` is ‖T‖²_F of the whole T; ``full_energy`` is ‖(W0 + ΔW_i) X_i‖²_F with
    the layer's bias included, for ``balance="full"``. What is None is not collected.
    """

    target: Tensor | None
    down_gram: Tensor | None
    target_energy: Tensor
    full_energy: Tensor | None
    dtype: torch.dtype
    directions: Directions | None = None

    def within(self, up: Tensor) -> Tensor:
        """``up``, (out, rank), as its parts in the rows of ``target``."""
        return up if self.directions is None else self.directions.matrix.to(up).mT @ up


@dataclass(frozen=True)
class Factor:
    """``cholesky`` is the lower factor of M + ``jitter`` · I, None where M is zero; ``key`` is what
    made it, and ``norms`` are ‖X̃_iᵀX̃_i‖_F."""

    key: tuple[object, ...]
    cholesky: Tensor | None
    jitter: float
    norms: Sequence[float]


@dataclass
class SharedInputs:
    """The input moments of every concept for one tensor, and the last factor made from them;
    ``added_up`` once they are those of all processes."""

    concepts: list[InputMoments]
    factor: Factor | None = None
    added_up: bool = False


def new_inputs(
    width: int, *, cross: bool, dtype: torch.dtype, device: torch.device
) -> InputMoments:
    def square() -> Tensor:
        return torch.zeros(width, width, dtype=dtype, device=device)

    return InputMoments(square(), square() if cross else None)


def new_target(
    out: int,
    width: int,
    change: LowRank | None,
    *,
    full: bool,
    down_gram: bool = True,
    full_energy: bool = True,
    directions: Directions | None = None,
    dtype: torch.dtype,
    device: torch.device,
) -> TargetMoments:
    rows = out if directions is None else directions.matrix.shape[1]
    rank = change.rank if change is not None and down_gram else 0

    def energy() -> Tensor:
        return torch.zeros((), dtype=_energy_dtype(device), device=device)

    return TargetMoments(
        torch.zeros(rows, width, dtype=dtype, device=device) if full else None,
        torch.zeros(rank, rank, dtype=dtype, device=device) if rank else None,
        energy(),
        energy() if full_energy else None,
        dtype,
        directions,
    )


def add_inputs(moments: InputMoments, reference: Tensor | None, merged: Tensor) -> None:
    """``reference`` X and ``merged`` X̃ are (tokens, in) of the same samples; X is only read where
    ``cross`` is kept."""
    dtype = moments.own.dtype
    merged = merged.to(dtype)
    width = merged.shape[1]
    block = _block(width, merged.device)
    for start in range(0, width, block):
        rows = slice(start, start + block)
        moments.own[rows, start:].addmm_(merged[:, rows].mT, merged[:, start:])
    moments.whole = width <= block
    if moments.cross is not None:
        assert reference is not None
        moments.cross.addmm_(reference.to(dtype).mT, merged)
    moments.tokens += merged.shape[0]


def complete(moments: InputMoments) -> None:
    """Mirror the upper block triangle of ``own``."""
    if moments.whole:
        return
    width = moments.own.shape[0]
    block = _block(width, moments.own.device)
    for stop in range(block, width, block):
        rows = slice(stop - block, stop)
        moments.own[stop:, rows] = moments.own[rows, stop:].mT
    moments.whole = True


def add_balance(
    moments: TargetMoments,
    change: LowRank | None,
    reference: Tensor | None,
    full_output: Tensor | None,
) -> None:
    """Add one piece of tokens to what λ is made of.

    ``reference`` X is (tokens, in), only read where ``down_gram`` is kept; ``full_output`` is
    (W0 + ΔW_i) X, (tokens, out), only read where ``full_energy`` is.
    """
    dtype = moments.dtype
    if moments.down_gram is not None and change is not None:
        assert reference is not None
        z = reference.to(dtype) @ change.down.to(dtype).mT
        moments.down_gram.addmm_(z.mT, z)
    if moments.full_energy is not None:
        assert full_output is not None
        moments.full_energy += _energy(full_output.to(dtype))


def target_of(
    full_output: Tensor, base_output: Tensor, drift: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """T of one piece of tokens, a new tensor: ``full_output`` is (W0 + ΔW_i) X, ``base_output`` is
    W0 X̃, both (tokens, out) with the layer's bias, and ``drift`` is what the residual stream lacks
    of LoRA i's own."""
    target = full_output.to(dtype) - base_output.to(dtype)
    return target if drift is None else target.add_(drift.to(dtype))


def add_target_rows(moments: TargetMoments, target: Tensor, merged: Tensor) -> None:
    """Add T, (tokens, out), of inputs X̃, (tokens, in)."""
    assert moments.target is not None
    moments.target_energy += _energy(target)
    if moments.directions is not None:
        target = target @ moments.directions.matrix
    moments.target.addmm_(target.mT, merged.to(moments.dtype))


def _block(width: int, device: torch.device) -> int:
    """Rows of one piece of a symmetric update: many enough for the matrix units."""
    return max(128 if device.type == "cpu" else 512, -(-width // 16))


def _energy(tensor: Tensor) -> Tensor:
    """‖tensor‖²_F in the dtype of energies, without a copy of the tensor."""
    return torch.linalg.vector_norm(tensor).to(_energy_dtype(tensor.device)) ** 2


def _energy_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
