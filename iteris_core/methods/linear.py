"""Linear merging: weighted sums of the changes, exact on factors (a sum is a concatenation)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..lora import LowRank, Rank, check_rank, concatenate, truncate
from ..report import SiteReport
from .registry import Merged, Task, method


@dataclass(frozen=True)
class LinearSettings:
    """``rank``: cut each site to this rank, or to this share of energy, by plain SVD (None: no)."""

    rank: Rank | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)


@method("average", LinearSettings, needs_host=False)
def average(task: Task, settings: LinearSettings) -> Merged:
    """The mean of the changes, Σ w_i ΔW_i / Σ w_i (paper, eq. 2 with equal λ)."""
    total = sum(task.weights)
    return _combine(task, settings, lambda weight: weight / total)


@method("sum", LinearSettings, needs_host=False)
def sum_up(task: Task, settings: LinearSettings) -> Merged:
    """The sum of the changes, Σ w_i ΔW_i: what loading all LoRAs at once does."""
    return _combine(task, settings, lambda weight: weight)


def _combine(task: Task, settings: LinearSettings, factor: Callable[[float], float]) -> Merged:
    merged: dict[str, tuple[LowRank, SiteReport]] = {}
    for site, changes in task.references.items():
        change = concatenate(
            [
                change.scaled(factor(weight))
                for change, weight in zip(changes, task.weights, strict=True)
                if change is not None
            ]
        )
        lost = 0.0
        if settings.rank is not None and settings.rank < change.rank:
            change, lost = truncate(change, settings.rank)
        merged[site] = change, SiteReport(change.rank, truncated=lost)
    return merged
