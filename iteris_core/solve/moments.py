"""The common part of reductions to input moments: λ, the factor of M, and the final steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import SolveError
from ..linalg.lowrank import truncate_factors
from ..linalg.precision import full_precision, solve_device
from ..lora import LowRank, SiteChanges
from .inputs import NOT_FINITE, Factor, InputMoments, residuals_of
from .problem import Reduction, RegressionSpec, SiteContext, Solution, Tokens, finite_as
from .weighting import Weigher

_LEAST_RIDGE = 1e-9  # above none at all, where a bound is to be kept


class MomentReduction(Reduction):
    """X̃ᵀX̃ for every concept, of class ``inputs``, plus a subclass's data about the targets."""

    inputs: InputMoments

    def __init__(self, context: SiteContext, inputs: type[InputMoments], weigher: Weigher) -> None:
        super().__init__(context.changes)
        self.inputs, self._adds = context.share(inputs)
        self.weigher = weigher

    def add(self, tokens: Tokens) -> None:
        with full_precision(self.inputs.own[0].device):
            if self._adds:
                self._add_inputs(tokens)
            self.weigher.add(tokens)
            self._add_targets(tokens)

    def solve(self, fit: RegressionSpec) -> Solution:
        """See :class:`.problem.Reduction`; a share of energy as rank refers to the solution at Σ
        r_i.

        If no input has energy, any change fits, and the mean of the changes is used.
        """
        if not all(map(math.isfinite, self._energies())):
            raise SolveError(NOT_FINITE)
        device = solve_device(self.inputs.own[0].device)
        changes, like = self.changes.to(device=device), self.changes.like
        rank = min(fit.rank if isinstance(fit.rank, int) else changes.rank, *changes.shape)
        lambdas = fit.lambdas(self.weigher.values(changes, self.inputs))
        if float(self.inputs.tokens.max()) >= fit.shrinks_below * self.inputs.width:
            fit = replace(fit, shrink=1.0)
        while True:
            factor = self.inputs.factor(lambdas, fit.ridge, fit.shrink, fit.dtype)
            if factor is None:
                mean = changes.mean(fit.weights, torch.float64)
                change, lost = truncate_factors(mean, rank)
                break
            with full_precision(device):
                change, lost = self._change(changes, lambdas, factor, fit, rank)
            if fit.ridge >= 1 or not change.squared_norm() > fit.bound**2:
                break
            fit = replace(fit, ridge=max(3 * fit.ridge, _LEAST_RIDGE))
            del factor, change  # before the next ones are made
            self.inputs.forget_factor()
        if isinstance(fit.rank, float):
            change, more = truncate_factors(change, fit.rank, factor and factor.cholesky.lower)
            lost = 1 - (1 - lost) * (1 - more)
        total = sum(lambdas)
        solution = Solution(
            finite_as(change, like),
            tuple(value / total for value in lambdas),
            condition=math.inf if factor is None else factor.cholesky.condition,
            truncated=lost,
        )
        if not fit.residuals:
            return solution
        mean = changes.mean(fit.weights, torch.float64)
        before, after = residuals_of(
            mean, change.to(torch.float64), changes, self.inputs, self._wanted
        )
        return replace(solution, before=before, after=after)

    def _add_inputs(self, tokens: Tokens) -> None:
        self.inputs.add(tokens.concept, tokens.merged)

    @abstractmethod
    def _add_targets(self, tokens: Tokens) -> None: ...

    @abstractmethod
    def _change(
        self,
        changes: SiteChanges,
        lambdas: list[float],
        factor: Factor,
        fit: RegressionSpec,
        rank: int,
    ) -> tuple[LowRank, float]:
        """ΔW at ``rank``, and the share of energy lost in the cut."""

    @abstractmethod
    def _wanted(self, concept: int, candidate: LowRank) -> tuple[float, Tensor]:
        """See :data:`.inputs.Wanted`."""

    def _energies(self) -> list[float]:
        """Energies of whole tensors, which reveal NaN and infinite values."""
        return []
