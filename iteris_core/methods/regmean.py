"""RegMean and RegMean++: least squares on each LoRA's own inputs, or on the merged model's.

RegMean (Jin et al., ICLR 2023, arXiv 2212.09849) is the paper's eq. 4, ΔW = (Σ ΔW_i G_i)(Σ G_i)⁻¹
with G_i = X_iᵀX_i, its off-diagonal entries shrunk. RegMean++ (2025, arXiv 2508.03121) takes G_i
from the inputs that reach the site through already merged layers; its authors' code merges one
transformer block at a time, and takes G_i within a block from each LoRA's own layers
(:mod:`.own_blocks`). Both are exactly low rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..hosts.protocol import Stage
from ..passes.batches import ExecutionConfig
from ..passes.job import Job
from ..passes.sweep import solve_sites
from ..settings import Settings, setting
from ..solve.adapter import Gram
from ..solve.problem import RegressionSpec, StageSolver, Tokens
from .own_blocks import OwnBlocks
from .registry import Merged, micro_batch_setting, on_activations, on_model, rank_setting


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


@dataclass(frozen=True)
class RegMeanPlusPlusSettings(RegMeanSettings):
    by: Literal["layer", "block"] = setting(
        "layer",
        "Which inputs a layer is fitted to: the merged model's, or, as in the authors' code, each "
        "LoRA's own within a block (such as a transformer layer) that receives what the merged "
        "blocks before it give.",
    )


@on_activations("regmean", RegMeanSettings, Gram, merged_inputs=False)
def regmean(job: Job, settings: RegMeanSettings) -> RegressionSpec:
    """Least squares on each LoRA's own inputs (RegMean, ICLR 2023; paper, eq. 4)."""
    by = settings.weighting
    return RegressionSpec(job.weights, 0.0, by, shrink=settings.shrink, rank=settings.rank)


class _OwnGram(Gram):
    """X_iᵀX_i of the reference rows of a sweep."""

    def _add_inputs(self, tokens: Tokens) -> None:
        self.inputs.add(tokens.concept, tokens.reference)


@on_model("regmean++", RegMeanPlusPlusSettings, sweeps=lambda _: 1, sums=True)
def regmean_plus_plus(job: Job, settings: RegMeanPlusPlusSettings) -> Merged:
    """RegMean on inputs that passed through already merged layers (RegMean++, 2025)."""
    fit = regmean(job, settings)
    kind = _OwnGram if settings.by == "block" else Gram
    solver = StageSolver(
        begin=kind,
        solve=lambda _, reduced: reduced.solve(fit),
        bytes=lambda site, _: kind.bytes(job.changes[site]),
    )
    with job.run() as run, OwnBlocks(run) as blocks:

        def solver_of(stage: Stage) -> StageSolver:
            if settings.by == "block":
                blocks.entered(stage)
            return solver

        return Merged(*solve_sites(run, solver_of, ExecutionConfig(settings.micro_batch)))
