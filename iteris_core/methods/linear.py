"""Linear merging: weighted sums of the changes, exact on factors (a sum is a concatenation)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..linalg.lowrank import truncate
from ..lora import LowRank, Rank, concatenate
from ..passes.job import Job
from ..report.report import SiteReport
from ..settings import Settings, setting
from .registry import SUM_OF_RANKS, Merged, method


@dataclass(frozen=True)
class LinearSettings(Settings):
    rank: int | float | None = setting(
        None,
        "Rank to which a layer is cut by plain SVD.",
        share="energy",
        none=SUM_OF_RANKS,
        low=1,
    )


@dataclass(frozen=True)
class TaskArithmeticSettings(LinearSettings):
    scale: float = setting(
        0.4, "What the sum is multiplied by; 0.3 to 0.4 is what its authors found best."
    )


@dataclass(frozen=True)
class SvdSettings(Settings):
    rank: int | float | None = setting(
        None,
        "Rank of the result.",
        share="energy",
        none="the largest rank among the LoRAs of a layer",
        low=1,
    )


@method("average", LinearSettings, needs_host=False)
def average(job: Job, settings: LinearSettings) -> Merged:
    """The mean of the changes, Σ w_i ΔW_i / Σ w_i (paper, eq. 2 with equal λ)."""
    total = sum(job.weights)
    return _combine(job, settings.rank, lambda weight: weight / total)


@method("sum", LinearSettings, needs_host=False)
def sum_up(job: Job, settings: LinearSettings) -> Merged:
    """The sum of the changes, Σ w_i ΔW_i: what loading all LoRAs at once does."""
    return _combine(job, settings.rank, lambda weight: weight)


@method("task-arithmetic", TaskArithmeticSettings, needs_host=False)
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
            change, lost = truncate(change, limit)
        merged[site] = change, SiteReport(change.rank, truncated=lost)
    return merged
