"""Linear merging: weighted sums of the changes, exact on factors (a sum is a concatenation)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..linalg.lowrank import cut_factors
from ..lora import LowRank, Rank, check_rank, concatenate
from ..passes.job import Job
from ..report.report import SiteReport
from .registry import Merged, method


@dataclass(frozen=True)
class LinearSettings:
    """``rank``: cut each site to this rank, or to this share of energy, by plain SVD (None: no)."""

    rank: Rank | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)


@dataclass(frozen=True)
class TaskArithmeticSettings(LinearSettings):
    """``scale``: what the sum is multiplied by; 0.3 to 0.4 is what its authors found best."""

    scale: float = 0.4


@dataclass(frozen=True)
class SvdSettings:
    """``rank``: of the result (None: the largest rank among the LoRAs of a site)."""

    rank: Rank | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)


@method("average", LinearSettings, needs_host=False)
def average(job: Job, settings: LinearSettings) -> Merged:
    """The mean of the changes, Σ w_i ΔW_i / Σ w_i (paper, eq. 2 with equal λ)."""
    total = sum(job.weights)
    return _combine(job, settings.rank, lambda weight: weight / total)


@method("sum", LinearSettings, needs_host=False)
def sum_up(job: Job, settings: LinearSettings) -> Merged:
    """The sum of the changes, Σ w_i ΔW_i: what loading all LoRAs at once does."""
    return _combine(job, settings.rank, lambda weight: weight)


@method("job-arithmetic", TaskArithmeticSettings, needs_host=False)
def task_arithmetic(job: Job, settings: TaskArithmeticSettings) -> Merged:
    """A scaled sum of the changes (Ilharco et al., ICLR 2023, arXiv 2212.04089)."""
    return _combine(job, settings.rank, lambda weight: settings.scale * weight)


@method("svd", SvdSettings, needs_host=False)
def svd(job: Job, settings: SvdSettings) -> Merged:
    """The sum of the changes, cut to the rank of one LoRA by SVD (as kohya's and peft's svd)."""
    return _combine(job, settings.rank or -1, lambda weight: weight)


def _combine(job: Job, rank: Rank | None, factor: Callable[[float], float]) -> Merged:
    """A weighted sum per site, cut to ``rank`` (None: exact; -1: the largest of the inputs')."""
    merged: dict[str, tuple[LowRank, SiteReport]] = {}
    for site, changes in job.references.items():
        parts = [
            change.scaled(factor(weight))
            for change, weight in zip(changes, job.weights, strict=True)
            if change is not None
        ]
        change, lost = concatenate(parts), 0.0
        limit = max(part.rank for part in parts) if rank == -1 else rank
        if limit is not None and limit < change.rank:
            change, lost = cut_factors(change, limit)
        merged[site] = change, SiteReport(change.rank, truncated=lost)
    return merged
