"""DARE (Yu et al., ICML 2024, arXiv 2311.03099): drop entries at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..passes.job import Job
from ..settings import Settings, setting
from .dense import merge_dense
from .registry import SUM_OF_RANKS, Merged, method
from .ties import disjoint_mean


@dataclass(frozen=True)
class DareSettings(Settings):
    density: float = setting(0.5, "Chance of an entry to stay.", above=0, high=1)
    scale: float = setting(1.0, "What the merged change is multiplied by; 1 for the plain sum.")
    rank: int | float | None = setting(
        None, "Rank of the result.", none=SUM_OF_RANKS, share="energy", low=1
    )


@method("dare-linear", DareSettings, needs_host=False)
def dare_linear(job: Job, settings: DareSettings) -> Merged:
    """Drop entries at random, rescale, add up (DARE, ICML 2024)."""

    def merge(changes: Sequence[Tensor]) -> Tensor:
        return settings.scale * _dropped(changes, settings.density, job.generator).sum(dim=0)

    return merge_dense(job, settings.rank, merge)


@method("dare-ties", DareSettings, needs_host=False)
def dare_ties(job: Job, settings: DareSettings) -> Merged:
    """Drop entries at random, rescale, then elect signs as TIES does (DARE, ICML 2024)."""

    def merge(changes: Sequence[Tensor]) -> Tensor:
        dropped = _dropped(changes, settings.density, job.generator)
        return settings.scale * disjoint_mean(dropped)

    return merge_dense(job, settings.rank, merge)


def _dropped(changes: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """(concepts, out, in): each entry is zero, or 1 / density of what it was."""
    stacked = torch.stack(list(changes))
    keep = torch.rand(stacked.shape, generator=generator, dtype=torch.float64) < density
    return stacked * keep.to(stacked.device) / density
