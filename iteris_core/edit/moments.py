"""Second moments of the inputs and outputs of a model's layers, one of each per layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..passes.batches import REFERENCE, ExecutionConfig
from ..passes.job import Run
from ..passes.sweep import solve_sites
from ..solve.inputs import InputMoments
from ..solve.problem import MemoryEstimate, Reduction, SiteContext, Solution, StageSolver, Tokens

_T = TypeVar("_T")
_SPREAD = 0.1
"""Share of the mean input energy added to every direction of a layer's inputs, so that directions
without data still count a little. Chosen on two of the toybox's own concepts."""


@dataclass(frozen=True)
class LayerMoments:
    """Moments of a layer's tokens x: ``root`` is L, (in, in), float64, lower triangular, with L Lᵀ
    = E[x xᵀ] + 0.1 E‖x‖²/in I; None if all tokens are zero. ``output`` is E‖y‖² for the whole
    outputs y."""

    root: Tensor | None
    output: float


class _Moments(Reduction):
    """Σ x xᵀ and Σ ‖y‖² over the single concept's rows."""

    def __init__(self, context: SiteContext) -> None:
        super().__init__(context.changes)
        inputs, self._adds = context.share(InputMoments)
        self.inputs: InputMoments = inputs
        self._output = torch.zeros(2, dtype=torch.float64)

    def add(self, tokens: Tokens) -> None:
        if self._adds:
            self.inputs.add(0, tokens.merged)
        output = tokens.output
        self._output += torch.tensor([float(output.float().square().sum()), len(output)])

    def solve(self, fit: object) -> Solution:
        return Solution(self.changes.like)

    def seen(self) -> LayerMoments:
        self.inputs.complete()
        energy, count = self._output.tolist()
        moment = self.inputs.own[0].double() / max(count, 1.0)
        spread, output = _SPREAD * float(moment.diagonal().mean()), energy / max(count, 1.0)
        if spread <= 0:
            return LayerMoments(None, output)
        moment.diagonal().add_(spread)
        return LayerMoments(torch.linalg.cholesky(moment), output)


def look(run: Run, of: Callable[[str, LayerMoments], _T]) -> dict[str, _T]:
    """Run the rows of one concept under its LoRA; returns what ``of`` makes of the moments of every
    site of its changes."""
    found: dict[str, _T] = {}

    def solve(site: str, reduction: Reduction) -> Solution:
        assert isinstance(reduction, _Moments)
        found[site] = of(site, reduction.seen())
        return Solution(reduction.changes.like)

    def size(site: str, sweep: bool) -> MemoryEstimate:
        square = run.lockstep.changes[site].shape[1] ** 2
        return MemoryEstimate(4 * square, 16 * square, 0, 4 * square)

    if run.lockstep.changes:
        solver = StageSolver(begin=_Moments, solve=solve, bytes=size)
        solve_sites(run, lambda _: solver, ExecutionConfig(32), REFERENCE)
    return found
