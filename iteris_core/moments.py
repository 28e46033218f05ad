"""Second moments of one site, streamed: everything that :mod:`.solve` needs to know of the inputs.

Rows are tokens, as in PyTorch; every function adds to what is there, so tokens may arrive in any
number of pieces. Statistics are kept in one dtype (float32 unless the caller says float64).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .lora import LowRank


@dataclass
class InputMoments:
    """What several sites share when they receive the same tensor, one concept's part of it.

    ``own`` is X̃ᵀX̃ and ``cross`` is XᵀX̃, both (in, in); ``cross`` is only kept for
    ``align="adapter"``. ``tokens`` counts rows.
    """

    own: Tensor
    cross: Tensor | None
    tokens: int = 0


@dataclass
class TargetMoments:
    """What belongs to one site and one concept.

    ``target`` is TᵀX̃, (out, in), for ``align="full"``; ``down_gram`` is (X downᵀ)ᵀ(X downᵀ),
    (rank, rank), for a concept that changes the site; ``target_energy`` is ‖T‖²_F and
    ``full_energy`` is ‖(W0 + ΔW_i) X_i‖²_F with the layer's bias included.
    """

    target: Tensor | None
    down_gram: Tensor | None
    target_energy: Tensor
    full_energy: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Factor:
    """``cholesky`` is the lower factor of M + ``jitter`` · I, float64; ``key`` is what made it."""

    key: tuple[float, ...]
    cholesky: Tensor
    jitter: float


@dataclass
class SharedInputs:
    """The input moments of every concept for one tensor, and the last factor made from them."""

    concepts: list[InputMoments]
    factor: Factor | None = None


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
    dtype: torch.dtype,
    device: torch.device,
) -> TargetMoments:
    rank = 0 if change is None else change.rank
    zeros = torch.zeros
    return TargetMoments(
        zeros(out, width, dtype=dtype, device=device) if full else None,
        zeros(rank, rank, dtype=dtype, device=device) if rank else None,
        zeros((), dtype=_energy_dtype(device), device=device),
        zeros((), dtype=_energy_dtype(device), device=device),
        dtype,
    )


def add_inputs(moments: InputMoments, reference: Tensor, merged: Tensor) -> None:
    """``reference`` X and ``merged`` X̃ are (tokens, in) of the same samples."""
    dtype = moments.own.dtype
    merged = merged.to(dtype)
    moments.own.addmm_(merged.mT, merged)
    if moments.cross is not None:
        moments.cross.addmm_(reference.to(dtype).mT, merged)
    moments.tokens += merged.shape[0]


def add_target(
    moments: TargetMoments,
    change: LowRank | None,
    reference: Tensor,
    merged: Tensor,
    full_output: Tensor,
    base_output: Tensor,
    drift: Tensor | None = None,
) -> None:
    """Add one piece of tokens.

    ``reference`` X and ``merged`` X̃ are (tokens, in); ``full_output`` is (W0 + ΔW_i) on X and
    ``base_output`` is W0 on X̃, both (tokens, out) with the layer's bias. ``drift`` is what the
    residual stream lacks of LoRA i's own, (tokens, out): it is added to the target.
    """
    dtype = moments.dtype
    if moments.down_gram is not None and change is not None:
        z = reference.to(dtype) @ change.down.to(dtype).mT
        moments.down_gram.addmm_(z.mT, z)
    full_output = full_output.to(dtype)
    moments.full_energy += (full_output**2).sum()
    if moments.target is not None:
        target = full_output - base_output.to(dtype)
        if drift is not None:
            target += drift.to(dtype)
        moments.target.addmm_(target.mT, merged.to(dtype))
        moments.target_energy += (target**2).sum()


@contextmanager
def full_precision(device: torch.device) -> Generator[None]:
    """float32 products that are float32: no TF32, no bfloat16 passes, no autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _energy_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
