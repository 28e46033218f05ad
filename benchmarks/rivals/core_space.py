"""Core Space (Panariello et al., NeurIPS 2025, arXiv 2509.17786): TIES on small matrices.

With U the left singular vectors of [up_1 … up_N] and Vᵀ the right ones of [down_1; …; down_N], a
change is ΔW_i = U M_i Vᵀ exactly. TIES merges the M_i, and ΔW = U M Vᵀ: sums would be what they are
of whole matrices. At a ``rank`` M is cut to it; ``isotropic`` makes it Iso-C's (+ Iso there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iteris_core.linalg import truncate_factors
from iteris_core.lora import LowRank
from iteris_core.methods.elected_signs import disjoint_mean
from iteris_core.methods.registry import AtSite, on_weights, rank_setting
from iteris_core.settings import Settings, setting

from .iso_c import evened


@dataclass(frozen=True)
class CoreSpaceSettings(Settings):
    density: float = setting(
        0.25, "Share of entries kept of each LoRA's small matrix.", above=0, high=1
    )
    isotropic: bool = setting(False, "All singular values of the result at their mean.")
    scale: float = setting(1.0, "What the merged change is multiplied by.")
    rank: int | float | None = rank_setting()


@on_weights("core-space", CoreSpaceSettings)
def core_space(at: AtSite, settings: CoreSpaceSettings) -> tuple[LowRank, float]:
    """TIES on small matrices in bases that all LoRAs share (Core Space, NeurIPS 2025)."""
    left, cores, right = core_of([change.to(torch.float64) for change in at.weighted()])
    merged = elected(cores, settings.density) * settings.scale
    change = LowRank(left @ merged, right, at.changes.like.kernel)
    change, lost = truncate_factors(change, settings.rank or min(change.rank, *change.shape))
    change = evened(change) if settings.isotropic else change
    return change.to(at.changes.like.up.dtype), lost


def core_of(changes: Sequence[LowRank]) -> tuple[Tensor, list[Tensor], Tensor]:
    """U, (out, p), the M_i, (p, q) each, and Vᵀ, (q, in); p and q are Σ r_i or the shape's."""
    left = torch.linalg.svd(torch.cat([c.up for c in changes], dim=1), full_matrices=False).U
    right = torch.linalg.svd(torch.cat([c.down for c in changes]), full_matrices=False).Vh
    return left, [(left.mT @ c.up) @ (c.down @ right.mT) for c in changes], right


def elected(cores: Sequence[Tensor], density: float) -> Tensor:
    """TIES of small matrices."""
    return disjoint_mean(torch.stack([_largest(core, density) for core in cores]))


def _largest(core: Tensor, density: float) -> Tensor:
    """``core`` with all but the ``density`` share of largest magnitudes set to 0."""
    keep = max(1, int(density * core.numel()))
    if keep == core.numel():
        return core
    kept = torch.zeros_like(core).flatten()
    index = core.abs().flatten().topk(keep).indices
    kept[index] = core.flatten()[index]
    return kept.reshape(core.shape)
