"""Linear merging: weighted sums of the changes, exact on factors (a sum is a concatenation)."""

from __future__ import annotations

from dataclasses import dataclass

from ..linalg import cut_to
from ..lora import LowRank, Rank, concatenate
from ..settings import Settings, setting
from .registry import AtSite, on_weights, rank_setting


@dataclass(frozen=True)
class LinearSettings(Settings):
    rank: int | float | None = rank_setting("Rank to which each layer is cut by plain SVD.")


@dataclass(frozen=True)
class TaskArithmeticSettings(LinearSettings):
    scale: float = setting(0.4, "Factor on the sum; its authors found 0.3 to 0.4 best.")


@dataclass(frozen=True)
class SvdSettings(Settings):
    rank: int | float | None = rank_setting(none="the largest rank among the LoRAs of a layer")


@on_weights("average", LinearSettings)
def average(at: AtSite, settings: LinearSettings) -> tuple[LowRank, float]:
    """The mean of the changes, Σ w_i ΔW_i / Σ w_i (paper, eq. 2 with equal λ)."""
    return _combined(at, 1 / sum(at.weights), settings.rank)


@on_weights("sum", LinearSettings)
def sum_up(at: AtSite, settings: LinearSettings) -> tuple[LowRank, float]:
    """The sum of the changes, Σ w_i ΔW_i: what loading all LoRAs at once does."""
    return _combined(at, 1.0, settings.rank)


@on_weights("task-arithmetic", TaskArithmeticSettings)
def task_arithmetic(at: AtSite, settings: TaskArithmeticSettings) -> tuple[LowRank, float]:
    """A scaled sum of the changes (Ilharco et al., ICLR 2023, arXiv 2212.04089)."""
    return _combined(at, settings.scale, settings.rank)


@on_weights("svd", SvdSettings)
def svd(at: AtSite, settings: SvdSettings) -> tuple[LowRank, float]:
    """The sum of the changes, cut to the rank of one LoRA by SVD (like kohya's and peft's svd)."""
    largest = max(change.rank for change in at.changes.present.values())
    return _combined(at, 1.0, settings.rank or largest)


def _combined(at: AtSite, scale: float, rank: Rank | None) -> tuple[LowRank, float]:
    """A scaled sum of the weighted changes, cut to ``rank`` (None: exact)."""
    return cut_to(concatenate([part.scaled(scale) for part in at.weighted()]), rank)
