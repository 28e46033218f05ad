"""TIES and DARE: entries that agree in sign.

TIES (Yadav et al., NeurIPS 2023, arXiv 2306.01708) trims, elects a sign per entry and averages what
has it. A LoRA is trimmed over all of its sites together, as in the authors' code: a layer that it
changes little is left to the others. DARE (Yu et al., ICML 2024, arXiv 2311.03099) drops entries at
random and rescales the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import cut_dense
from ..lora import LowRank
from ..settings import Settings, setting
from .registry import AtSite, on_weights, rank_setting


@dataclass(frozen=True)
class TiesSettings(Settings):
    density: float = setting(
        0.2, "Share of each LoRA's entries to keep; 0.2 in the paper.", above=0, high=1
    )
    scale: float = setting(1.0, "Factor on the merged change (λ).")
    rank: int | float | None = rank_setting()


@on_weights("ties", TiesSettings, trims=AtSite.dense)
def ties(at: AtSite, settings: TiesSettings) -> tuple[LowRank, float]:
    """Trim small entries, elect a sign per entry, average what agrees (NeurIPS 2023)."""
    merged = disjoint_mean(at.trimmed(at.dense()))
    return cut_dense(at.changes, settings.scale * merged, settings.rank)


def disjoint_mean(changes: Tensor) -> Tensor:
    """Mean over (concepts, …) of the entries that have the elected sign: that of their sum, or of
    the total if the sum is zero."""
    total = changes.sum(dim=0)
    elected = torch.where(total == 0, total.sum().sign(), total.sign())
    agree = (changes.sign() == elected) & (changes != 0)
    return (changes * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


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
