"""Cuts to a rank: of whole ΔW matrices, and of factors."""

from __future__ import annotations

from torch import Tensor

from ..linalg.lowrank import cut_factors, cut_matrix
from ..lora import LowRank, Rank, SiteChanges


def cut(changes: SiteChanges, dense: Tensor, rank: Rank | None) -> tuple[LowRank, float]:
    """``dense``, (out, in), which is of full rank in general, at ``rank`` by SVD (None: Σ r_i of
    the ``changes`` that it was made of), and the share of energy that is lost."""
    limit = rank if isinstance(rank, int) else changes.rank
    change, lost = cut_matrix(dense, min(limit, *dense.shape), like=changes.like)
    if isinstance(rank, float):
        change, more = cut_factors(change, rank)
        lost = 1 - (1 - lost) * (1 - more)
    return change, lost


def cut_to(change: LowRank, rank: Rank | None) -> tuple[LowRank, float]:
    """``change`` at ``rank`` at most (None: as it is), and the share of energy that is lost."""
    return (change, 0.0) if rank is None or rank >= change.rank else cut_factors(change, rank)
