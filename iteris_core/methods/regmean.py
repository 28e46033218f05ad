"""RegMean and RegMean++: least squares on each LoRA's own inputs, or on the merged model's.

RegMean (Jin et al., ICLR 2023, arXiv 2212.09849) is the paper's eq. 4, ΔW = (Σ ΔW_i G_i)(Σ G_i)⁻¹
with G_i = X_iᵀX_i, its off-diagonal entries shrunk. RegMean++ (2025, arXiv 2508.03121) takes G_i
from the inputs that reach the site through already merged layers. Both are exactly low rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..passes.job import Job
from ..settings import Settings, setting
from ..solve.adapter import Gram
from ..solve.problem import RegressionSpec
from .registry import micro_batch_setting, on_activations, rank_setting


@dataclass(frozen=True)
class RegMeanSettings(Settings):
    shrink: float = setting(
        0.9,
        "Factor on off-diagonal entries of the moments; 0.9 in the paper, 1 is eq. 4 of IterIS.",
        low=0,
        high=1,
    )
    weighting: Literal["none", "tokens"] = setting(
        "none",
        "How to balance the concepts: not at all, as in the papers' equations, or by their number "
        "of tokens, as in the authors' code.",
    )
    rank: int | float | None = rank_setting()
    micro_batch: int = micro_batch_setting()


@on_activations("regmean", RegMeanSettings, Gram, merged_inputs=False)
def regmean(job: Job, settings: RegMeanSettings) -> RegressionSpec:
    """Least squares on each LoRA's own inputs (RegMean, ICLR 2023; paper, eq. 4)."""
    by = settings.weighting
    return RegressionSpec(job.weights, 0.0, by, shrink=settings.shrink, rank=settings.rank)


@on_activations("regmean++", RegMeanSettings, Gram, merged_inputs=True)
def regmean_plus_plus(job: Job, settings: RegMeanSettings) -> RegressionSpec:
    """RegMean on inputs that passed through already merged layers (RegMean++, 2025)."""
    return regmean(job, settings)
