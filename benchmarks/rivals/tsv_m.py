"""TSV-M (Gargiulo et al., CVPR 2025, arXiv 2412.00081): singular vectors made orthogonal.

Of every change, U_i S_i V_iᵀ, a share of 1 / LoRAs of a whole matrix's directions stays. All left
ones side by side, U = P D Qᵀ, are replaced by the nearest orthonormal ones, P Qᵀ, all right ones
likewise, and ΔW = α U⊥ S V⊥ᵀ. Where they are more than a side has, the nearest is a tight frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iteris_core.linalg import cut_to, truncate_factors
from iteris_core.lora import LowRank
from iteris_core.methods.registry import AtSite, on_weights, rank_setting
from iteris_core.settings import Settings, setting

from .iso_c import by_svd


@dataclass(frozen=True)
class TsvMSettings(Settings):
    scale: float = setting(1.0, "What the merged change is multiplied by (α); 1 in the paper.")
    rank: int | float | None = rank_setting()


@on_weights("tsv-m", TsvMSettings)
def tsv_m(at: AtSite, settings: TsvMSettings) -> tuple[LowRank, float]:
    """The sum of the changes, with their singular vectors made orthogonal (TSV-M, CVPR 2025)."""
    merged = apart([change.to(torch.float64) for change in at.weighted()])
    merged, lost = cut_to(merged.scaled(settings.scale), settings.rank)
    return merged.to(at.changes.like.up.dtype), lost


def apart(changes: Sequence[LowRank]) -> LowRank:
    """U⊥ S V⊥ᵀ of ``changes`` in float64."""
    most = max(1, min(changes[0].shape) // len(changes))
    parts = [by_svd(truncate_factors(change, most)[0]) for change in changes]
    lefts, values, rights = (list(some) for some in zip(*parts, strict=True))
    left, right = _nearest(torch.cat(lefts, dim=1)), _nearest(torch.cat(rights))
    return LowRank(left * torch.cat(values), right, changes[0].kernel)


def _nearest(vectors: Tensor) -> Tensor:
    """P Qᵀ of ``vectors`` = P D Qᵀ: the solution of the orthogonal Procrustes problem."""
    p, _, qt = torch.linalg.svd(vectors, full_matrices=False)
    return p @ qt
