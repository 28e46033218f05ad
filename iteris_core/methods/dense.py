"""What the methods that work on whole ΔW matrices share."""

from __future__ import annotations

from torch import Tensor

from ..linalg.lowrank import cut_factors, cut_matrix
from ..lora import LowRank, Rank
from .registry import AtSite


def cut(at: AtSite, dense: Tensor, rank: Rank | None) -> tuple[LowRank, float]:
    """``dense``, (out, in), which is of full rank in general, at ``rank`` by SVD (None: Σ r_i), and
    the share of energy that is lost."""
    limit = rank if isinstance(rank, int) else at.changes.rank
    change, lost = cut_matrix(dense, min(limit, *dense.shape), like=at.changes.like)
    if isinstance(rank, float):
        change, more = cut_factors(change, rank)
        lost = 1 - (1 - lost) * (1 - more)
    return change, lost
