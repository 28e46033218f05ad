"""RegMean++ as its authors' code runs it (arXiv 2508.03121), one transformer block at a time.

G_i = X_iᵀX_i is of each LoRA's own inputs within the block, which receives what the merged blocks
before it give (:mod:`.own_blocks`). The code divides G_i by its tokens: ``weighting="tokens"``.
"""

from __future__ import annotations

from iteris_core.activations.tokens import Observation
from iteris_core.hosts.protocol import Stage
from iteris_core.methods.registry import on_model
from iteris_core.methods.regmean import RegMeanSettings, regmean
from iteris_core.passes.batches import ExecutionConfig
from iteris_core.passes.job import Job, Merged
from iteris_core.passes.sweep import Passes
from iteris_core.solve.moments import Gram
from iteris_core.solve.problem import StageSolver

from .own_blocks import OwnBlocks


class _OwnGram(Gram):
    """X_iᵀX_i of the reference rows of a sweep."""

    def _add_inputs(self, tokens: Observation) -> None:
        self.inputs.add(tokens.concept, tokens.reference)


@on_model("regmean++-blocks", RegMeanSettings, sweeps=lambda _: 1, sums=True)
def regmean_blocks(job: Job, settings: RegMeanSettings) -> Merged:
    """RegMean++ a block at a time, on each LoRA's own layers within it (its authors' code)."""
    fit = regmean(job, settings)
    solver = StageSolver(
        begin=_OwnGram,
        solve=lambda _, reduced: reduced.solve(fit),
        bytes=lambda site, _: _OwnGram.bytes(job.changes[site]),
    )
    with job.run() as run, OwnBlocks(run) as blocks:

        def solver_of(stage: Stage) -> StageSolver:
            blocks.entered(stage)
            return solver

        return Passes(run, solver_of, ExecutionConfig(settings.micro_batch)).solve()
