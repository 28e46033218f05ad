"""Iso-C (Marczak et al., ICML 2025, arXiv 2502.04959): the sum with an even spectrum.

Of the sum of the changes, U S Vᵀ, every singular value becomes their mean: ΔW = α s̄ U Vᵀ. The mean
runs over the rank of the sum, as in the code of Compress-then-Merge; the authors' own counts zeros
as well, and gives their arbitrary directions the mean. At a ``rank`` the sum is cut to it first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iteris_core.linalg import truncate_factors
from iteris_core.lora import LowRank, concatenate
from iteris_core.methods.registry import AtSite, on_weights, rank_setting
from iteris_core.settings import Settings, setting

_NOTHING = 1e-12
"""The share of the largest singular value below which one counts as zero."""


@dataclass(frozen=True)
class IsoCSettings(Settings):
    scale: float = setting(1.0, "What the merged change is multiplied by (α).")
    rank: int | float | None = rank_setting()


@on_weights("iso-c", IsoCSettings)
def iso_c(at: AtSite, settings: IsoCSettings) -> tuple[LowRank, float]:
    """The sum of the changes with all singular values at their mean (Iso-C, ICML 2025)."""
    total = concatenate([change.to(torch.float64) for change in at.weighted()])
    cut, lost = truncate_factors(total, settings.rank or total.rank)
    return evened(cut).scaled(settings.scale).to(at.changes.like.up.dtype), lost


def _by_svd(change: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ of a change whose components are those of its SVD, without zeros."""
    ups, downs = change.up.norm(dim=0), change.down.norm(dim=1)
    values = ups * downs
    some = values > _NOTHING * values.max()
    return change.up[:, some] / ups[some], values[some], change.down[some] / downs[some, None]


def evened(change: LowRank) -> LowRank:
    """A change whose components are those of its SVD, all at their mean singular value."""
    u, s, vt = _by_svd(change)
    return LowRank(u * s.mean(), vt, change.kernel) if len(s) else change
