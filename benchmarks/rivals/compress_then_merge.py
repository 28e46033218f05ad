"""Compress-then-Merge (He et al., ICML 2026, arXiv 2606.03723): the rank first, the merge then.

Of all changes together, each scaled to a share β of its own norm and 1 − β of their mean norm, the
partial Tucker decomposition by alternating least squares (HOOI) gives U, (out, r), and V, (in, r),
orthonormal, that keep the most energy of all U Uᵀ ΔW_i V Vᵀ. TIES merges the Uᵀ ΔW_i V of the
changes as they are, and ΔW = α U C Vᵀ has rank r by construction. All of it is done in the small
matrices of :mod:`.core_space`, which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iteris_core.lora import LowRank
from iteris_core.methods.registry import AtSite, on_weights
from iteris_core.settings import Settings, setting

from .core_space import core_of, elected

_ROUNDS, _SETTLED = 1000, 1e-6
"""Rounds at most, and the change of the relative error at which they end, as in the source."""


@dataclass(frozen=True)
class CompressThenMergeSettings(Settings):
    density: float = setting(
        0.25, "Share of entries kept of each LoRA's coordinates.", above=0, high=1
    )
    own_norm: float = setting(
        0.25,
        "How much a large LoRA counts for more in the shared directions (β): 1 as its norm says, "
        "0 as all others.",
        low=0,
        high=1,
    )
    scale: float = setting(0.75, "What the merged change is multiplied by (α).")
    rank: int | None = setting(
        None, "Rank of the result.", none="the largest rank among the LoRAs of a layer", low=1
    )


@on_weights("compress-then-merge", CompressThenMergeSettings)
def compress_then_merge(at: AtSite, settings: CompressThenMergeSettings) -> tuple[LowRank, float]:
    """All changes cut to shared directions of one rank, then TIES there (ICML 2026)."""
    changes = [change.to(torch.float64) for change in at.weighted()]
    rank = settings.rank or max(change.rank for change in changes)
    left, cores, right = core_of(changes)
    norms = torch.stack([core.norm() for core in cores]).clamp(min=1e-30)
    sizes = settings.own_norm + (1 - settings.own_norm) * norms.mean() / norms
    scaled = [core * size for core, size in zip(cores, sizes, strict=True)]
    ups, downs = _shared(scaled, min(rank, *cores[0].shape))
    small = [ups.mT @ core @ downs for core in cores]
    kept = sum(float(core.square().sum()) for core in small) / float(norms.square().sum())
    merged = elected(small, settings.density) * settings.scale
    change = LowRank(left @ ups @ merged, downs.mT @ right, at.changes.like.kernel)
    return change.to(at.changes.like.up.dtype), max(0.0, 1 - kept)


def _shared(cores: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """U and V with ``rank`` columns each, from the leading singular vectors of all cores side by
    side and on top of each other."""
    whole = math.sqrt(sum(float(core.square().sum()) for core in cores)) or 1.0
    downs = _leading([core.mT for core in cores], rank)
    ups, error = _leading(cores, rank), math.inf
    for _ in range(_ROUNDS):
        ups = _leading([core @ downs for core in cores], rank)
        downs = _leading([core.mT @ ups for core in cores], rank)
        kept = sum(float((ups.mT @ core @ downs).square().sum()) for core in cores)
        before, error = error, math.sqrt(max(0.0, 1 - kept / whole**2))
        if abs(before - error) < _SETTLED:
            break
    return ups, downs


def _leading(matrices: Sequence[Tensor], rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors of ``matrices`` side by side."""
    return torch.linalg.svd(torch.cat(list(matrices), dim=1), full_matrices=False).U[:, :rank]
