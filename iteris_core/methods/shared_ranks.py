"""Ranks of a merge shared out over its layers, by the result of a sweep without a cut.

A layer counts as for one LoRA (:mod:`..solve.ranks`), by √(E / Y). E is the energy of the change's
outputs, Σ λ_i ‖X̃_i ΔWᵀ‖², and Y that of the layer's whole outputs under the LoRAs, Σ λ_i ‖(W0 +
ΔW_i) X_i‖². A merge of many LoRAs has many components of similar energy. If s is the share of E not
yet covered, a component is worth its reduction of s². The first components of every layer therefore
come before the last ones of any.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from ..hosts.protocol import Stage
from ..lora import SiteChanges
from ..passes.batches import ExecutionConfig
from ..passes.job import Run
from ..passes.sweep import solve_sites
from ..solve.inputs import InputMoments
from ..solve.output import OutputMoments
from ..solve.problem import Reduction, SiteContext, Solution, StageSolver, Tokens
from ..solve.ranks import Components, share_numbers
from ..solve.weighting import ByOutput, Weigher


def shared_ranks(
    run: Run, solver_of: Callable[[Stage], StageSolver], batching: ExecutionConfig, numbers: int
) -> dict[str, int]:
    """Site → its rank in a file of that many ``numbers``, at least 1. ``solver_of`` makes solvers
    that cut nothing, reduce to :class:`..solve.output.OutputMoments` and report residuals."""
    found: dict[str, Components] = {}

    def weighed(stage: Stage) -> StageSolver:
        solver = solver_of(stage)

        def begin(context: SiteContext) -> Reduction:
            reduction = solver.begin(context)
            assert isinstance(reduction, OutputMoments)
            reduction.weigher = _WithOutputs(reduction.weigher, context)
            return reduction

        def solve(site: str, reduction: Reduction) -> Solution:
            solution = solver.solve(site, reduction)
            found[site] = _components(reduction, solution)
            return solution

        return replace(solver, begin=begin, solve=solve)

    solve_sites(run, weighed, batching, sweeps=2)
    return share_numbers(found, numbers, least=1)


class _WithOutputs(Weigher):
    """λ from ``inner``, plus the energy of the whole outputs."""

    def __init__(self, inner: Weigher, context: SiteContext) -> None:
        self._inner = inner
        self.outputs = ByOutput(len(context.changes), context.device)

    def add(self, tokens: Tokens) -> None:
        self._inner.add(tokens)
        self.outputs.add(tokens)

    def values(self, changes: SiteChanges, inputs: InputMoments) -> list[float]:
        return self._inner.values(changes, inputs)


def _components(reduction: Reduction, solution: Solution) -> Components:
    assert isinstance(reduction, OutputMoments)
    assert isinstance(reduction.weigher, _WithOutputs)
    targets, outputs = reduction.energies, reduction.weigher.outputs.energies
    explained = [1 - min(after, 1.0) ** 2 for after in solution.after]
    weights = torch.tensor(solution.weighting, dtype=torch.float64)
    given = float((weights * targets.double().cpu() * torch.tensor(explained)).sum())
    whole = max(float((weights * outputs.double().cpu()).sum()), 1e-30)
    # Both factors' norms contain the roots of the singular values at the output, up to one common
    # factor.
    shares = solution.change.up.double().norm(dim=0) ** 4
    shares = (shares / shares.sum().clamp(min=1e-30)).cpu()
    total = math.sqrt(given / whole)
    lost = torch.cat([shares.new_ones(1), 1 - shares.cumsum(0)])
    return Components(solution.change, total * (lost[:-1].square() - lost[1:].square()), total)
