"""DARE (Yu et al., ICML 2024, arXiv 2311.03099): drop entries at random and rescale the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.lowrank import cut_dense
from ..lora import LowRank
from ..settings import Settings, setting
from .registry import AtSite, on_weights, rank_setting
from .ties import disjoint_mean


@dataclass(frozen=True)
class DareSettings(Settings):
    density: float = setting(0.5, "Probability that an entry is kept.", above=0, high=1)
    scale: float = setting(1.0, "Factor on the merged change; 1 for the plain sum.")
    rank: int | float | None = rank_setting()


@on_weights("dare-linear", DareSettings)
def dare_linear(at: AtSite, settings: DareSettings) -> tuple[LowRank, float]:
    """Drop entries at random, rescale the rest, and add up (DARE, ICML 2024)."""
    dropped = _dropped(at, settings.density)
    return cut_dense(at.changes, settings.scale * dropped.sum(dim=0), settings.rank)


@on_weights("dare-ties", DareSettings)
def dare_ties(at: AtSite, settings: DareSettings) -> tuple[LowRank, float]:
    """Drop entries at random, rescale the rest, then elect signs as in TIES (DARE, ICML 2024)."""
    dropped = _dropped(at, settings.density)
    return cut_dense(at.changes, settings.scale * disjoint_mean(dropped), settings.rank)


def _dropped(at: AtSite, density: float) -> Tensor:
    """(concepts, out, in): each entry is zero, or divided by the density."""
    stacked = torch.stack(at.dense())
    keep = torch.rand(stacked.shape, generator=at.generator, dtype=torch.float64) < density
    return stacked * keep.to(stacked.device) / density
