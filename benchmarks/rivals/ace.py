"""ACE-Merging (Xu et al., CVPR 2026, arXiv 2603.02945): RegMean without data.

The covariance of LoRA i's inputs is taken from its own change, Σ_i = C_iᵀC_i with C_i = ΔW_i less
the mean of its rows, and

    ΔW = (Σ C_i S_i) (Σ S_i + 1 σᵀ)⁻¹,   S_i = Σ_i + ε I,

σ the column means of Σ Σ_i, as the authors' code has it. Where the LoRAs differ much in size (the
variance of log tr Σ_i against its squared mean), each Σ_i and its ε are divided by tr Σ_i, σ by the
mean trace, and the leading directions of ΔW + Σ ΔW_i (Σ_i − mean S) are added at their mean
singular value.

Everything stays within [up_1 … up_N 1] and [down_1; …; down_N; σ], so that nothing here is as large
as (out, in) or (in, in): the inverse is Woodbury's. A site that one LoRA changes keeps its change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, variance

import torch
from torch import Tensor

from iteris_core.linalg import cut_to, truncate_factors
from iteris_core.lora import LowRank, concatenate
from iteris_core.methods.registry import AtSite, on_weights, rank_setting
from iteris_core.settings import Settings, setting

from .iso_c import evened

_TINY = 1e-12  # added to traces in the source


@dataclass(frozen=True)
class AceSettings(Settings):
    ridge: float = setting(0.01, "ε, absolute as in the source.", above=0)
    uneven: float = setting(
        0.3,
        "From where on the LoRAs of a layer count as uneven in size, and are evened out; 0.3 in "
        "the paper's code, which takes any LoRAs for uneven whose squared norms are about 1.",
        low=0,
    )
    leading: float = setting(
        0.3,
        "The share of directions that is added where the LoRAs are uneven: of the sum of their "
        "ranks (in the paper, of a full matrix's).",
        above=0,
        high=1,
    )
    scale: float = setting(1.0, "What the merged change is multiplied by.")
    rank: int | float | None = rank_setting()


@on_weights("ace", AceSettings)
def ace(at: AtSite, settings: AceSettings) -> tuple[LowRank, float]:
    """RegMean on covariances that are taken from the changes themselves (ACE, CVPR 2026)."""
    changes = [c.to(torch.float64) for c in at.weighted() if c.squared_norm() > 0]
    if len(changes) < 2:
        return cut_to(concatenate(at.weighted()).scaled(settings.scale), settings.rank)
    merged = _merged(changes, settings).scaled(settings.scale)
    merged, lost = cut_to(merged, settings.rank or at.changes.rank)
    return merged.to(at.changes.like.up.dtype), lost


def _merged(changes: list[LowRank], settings: AceSettings) -> LowRank:
    sizes = [change.squared_norm() for change in changes]
    logs = [math.log(size) for size in sizes]
    uneven = variance(logs) > settings.uneven * fmean(logs) ** 2
    centred = [change.up - change.up.mean(dim=0) for change in changes]
    downs = [change.down for change in changes]
    energies = [LowRank(up, down).squared_norm() for up, down in zip(centred, downs, strict=True)]
    shares = [1 / max(energy, _TINY) if uneven else 1.0 for energy in energies]
    # Σ_i = down_iᵀ inner_i
    inner = [
        share * (up.mT @ up) @ down for share, up, down in zip(shares, centred, downs, strict=True)
    ]
    ridges = [settings.ridge * share for share in shares]
    stacked, inners = torch.cat(downs), torch.cat(inner)
    means = inners.mT @ stacked.mean(dim=1) / (fmean(sizes) if uneven else 1.0)
    right = torch.cat(
        [
            (down @ down.mT) @ own + e * down
            for down, own, e in zip(downs, inner, ridges, strict=True)
        ]
    )
    tall = torch.cat([stacked.mT, torch.ones_like(means)[:, None]], dim=1)
    rows = _over(right, sum(ridges), tall, torch.cat([inners, means[None]]))
    merged = LowRank(torch.cat(centred, dim=1), rows, changes[0].kernel)
    if not uneven:
        return merged
    mean = (stacked @ stacked.mT @ inners + sum(ridges) * stacked) / len(changes)
    own = torch.cat([down @ down.mT @ some for down, some in zip(downs, inner, strict=True)])
    residual = LowRank(torch.cat([c.up for c in changes], dim=1), own - mean, merged.kernel)
    count = max(1, int(settings.leading * len(stacked)))
    return concatenate(
        [merged, evened(truncate_factors(concatenate([residual, merged]), count)[0])]
    )


def _over(right: Tensor, ridge: float, tall: Tensor, wide: Tensor) -> Tensor:
    """``right`` (ridge I + tall wide)⁻¹"""
    inner = wide @ tall
    inner.diagonal().add_(ridge)
    return (right - torch.linalg.solve(inner, right @ tall, left=False) @ wide) / ridge
