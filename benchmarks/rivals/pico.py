"""Pico (Tang and Yang, 2026, arXiv 2604.16826): directions that all LoRAs share, scaled down.

With [up_1 … up_N] = U diag(σ) Vᵀ and s_j = σ_j² / Σ σ², each up factor is multiplied by
I + U diag(a − 1) Uᵀ, a_j = 1 / (1 + (N − 1) s_j). The changes are merged by their mean or by TSV-M,
and the result is given the mean of the changes' norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch

from iteris_core.linalg import cut_to
from iteris_core.lora import LowRank, concatenate
from iteris_core.methods.registry import AtSite, on_weights, rank_setting
from iteris_core.settings import Settings, setting

from .tsv_m import apart


@dataclass(frozen=True)
class PicoSettings(Settings):
    merge: Literal["mean", "tsv-m"] = setting(
        "mean", "How the changes are merged then: by their mean, or by TSV-M."
    )
    scale: float = setting(1.0, "What the merged change is multiplied by; 1 in the paper.")
    rank: int | float | None = rank_setting()


@on_weights("pico", PicoSettings)
def pico(at: AtSite, settings: PicoSettings) -> tuple[LowRank, float]:
    """Shared output directions of the LoRAs scaled down, then their mean (Pico, 2026)."""
    changes = [change.to(torch.float64) for change in at.weighted()]
    u, sigma, _ = torch.linalg.svd(torch.cat([c.up for c in changes], dim=1), full_matrices=False)
    shares = sigma.square() / sigma.square().sum().clamp(min=1e-30)
    less = 1 / (1 + (len(changes) - 1) * shares) - 1
    calmed = [LowRank(c.up + (u * less) @ (u.mT @ c.up), c.down, c.kernel) for c in changes]
    merged = apart(calmed) if settings.merge == "tsv-m" else concatenate(calmed)
    wanted = settings.scale * fmean(c.squared_norm() ** 0.5 for c in changes)
    merged = merged.scaled(wanted / max(merged.squared_norm() ** 0.5, 1e-30))
    merged, lost = cut_to(merged, settings.rank)
    return merged.to(at.changes.like.up.dtype), lost
