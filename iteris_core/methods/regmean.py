"""Least squares on activations: RegMean and Chain of Merges.

RegMean (Jin et al., ICLR 2023, arXiv 2212.09849) is the paper's eq. 4, ΔW = (Σ ΔW_i G_i)(Σ G_i)⁻¹
with G_i = X_iᵀX_i, its off-diagonal entries shrunk. RegMean++ (2025, arXiv 2508.03121) takes G_i
from the inputs that reach the site through already merged layers. Both are exactly low rank.

Chain of Merges (Buzzega et al., 2025, arXiv 2508.21421) fits each layer to its whole output in
every LoRA's own model, on inputs that passed through already merged layers: min Σ ‖X̃_i (W0 + ΔW)ᵀ −
X_i (W0 + ΔW_i)ᵀ‖², with equal tokens. That is the sweep of ``iteris`` without its weighting, choice
of tokens and repair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..passes.job import Job
from ..settings import Settings, setting
from ..solve.moments import Gram, OutputMoments
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


@dataclass(frozen=True)
class ChainOfMergesSettings(Settings):
    ridge: float = setting(
        1e-4,
        "How strongly a layer is pulled toward the LoRAs. With less, a merge falls apart at other "
        "strengths and beside other LoRAs.",
        low=0,
        below=1,
    )
    shrink: float = setting(
        1.0,
        "Factor on off-diagonal entries of the moments, as in RegMean; 1 is plain least squares.",
        above=0,
        high=1,
    )
    rank: int | float | None = rank_setting()
    micro_batch: int = micro_batch_setting()


@on_activations("chain-of-merges", ChainOfMergesSettings, OutputMoments, merged_inputs=True)
def chain_of_merges(job: Job, settings: ChainOfMergesSettings) -> RegressionSpec:
    """Least squares on each LoRA's own outputs, layer after layer (Chain of Merges, 2025)."""
    return RegressionSpec(
        job.weights, settings.ridge, "none", shrink=settings.shrink, rank=settings.rank
    )
