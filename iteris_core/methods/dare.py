"""DARE (Yu et al., ICML 2024, arXiv 2311.03099): drop entries at random and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lora import Rank, check_rank
from ..passes.job import Job
from .dense import merge_dense
from .registry import Merged, method
from .ties import check_density, disjoint_mean


@dataclass(frozen=True)
class DareSettings:
    """``density``: chance of an entry to stay; ``scale``: what the merged change is multiplied by
    (1 for the plain sum); ``rank``: of the result (None: Σ r_i)."""

    density: float = 0.5
    scale: float = 1.0
    rank: Rank | None = None

    def __post_init__(self) -> None:
        check_density(self.density)
        check_rank(self.rank)


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
