"""The paper's objective: the merged change reproduces each LoRA's change, T_i = X_i ΔW_iᵀ.

The ridge on the right-hand side is τ α ‖X_iᵀX̃_i‖_F ΔW_i (eq. 7, with τ = 1). The solution is
exactly low rank: ``up = [up_1 … up_N]``, ``down = [λ_i down_i C_i] M⁻¹`` with C_i = X_iᵀX̃_i +
ridge: Σ r_i right-hand sides, no dense ΔW and no SVD. Without factors it is equivalent to
``scipy.linalg.solve(M, K.T, assume_a="pos").T``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..linalg import frobenius, pieces, truncate_factors
from ..lora import LowRank, SiteChanges
from .inputs import CrossMoments, Factor, InputMoments, times
from .moments import MomentReduction
from .problem import (
    ByAdapter,
    ByTokens,
    MemoryEstimate,
    RegressionSpec,
    SiteContext,
    Solution,
    Tokens,
    Weigher,
    Weighting,
    weigher,
)

_PIECE = 1 << 21  # bytes of a moment during conversion to float64, see linalg.pieces


class AdapterMoments(MomentReduction):
    """X̃ᵀX̃ and, for targets T_i = X ΔW_iᵀ, XᵀX̃ for every concept. With ``adapter`` weighting, λ
    is eq. 8's, of what the targets are counted by."""

    kind: ClassVar[type[InputMoments]] = CrossMoments

    def __init__(self, context: SiteContext, weighting: Weighting, dtype: torch.dtype) -> None:
        self._outputs = ByAdapter(context.changes, dtype, context.device)
        by = self._outputs if weighting == "adapter" else weigher(weighting, context, dtype)
        super().__init__(context, self.kind, by)

    def _add_inputs(self, tokens: Tokens) -> None:
        super()._add_inputs(tokens)
        if isinstance(self.inputs, CrossMoments):
            self.inputs.add_cross(tokens.concept, tokens.reference, tokens.merged)

    def _add_targets(self, tokens: Tokens) -> None:
        if self._outputs is not self.weigher:
            self._outputs.add(tokens)

    @classmethod
    def bytes(cls, changes: SiteChanges, itemsize: int = 4) -> MemoryEstimate:
        """The solve needs M and a piece of a moment in float64, right-hand sides and their
        solution, and the factors of a cut, of rank Σ r_i."""
        out, width = changes.shape
        rank = changes.listed_rank
        square = width * width
        low = 18 * rank * (4 * width + 2 * out) + 32 * rank * rank
        solve = 8 * square + min(8 * square, _PIECE) + low
        kept = len(changes) * (2 if cls.kind is CrossMoments else 1) * square * itemsize
        return MemoryEstimate(kept, solve, kept + 8 * square, kept)

    def _cross(self, concept: int) -> Tensor:
        """A concept's XᵀX̃, (in, in)."""
        inputs = self.inputs
        return (inputs.cross if isinstance(inputs, CrossMoments) else inputs.own)[concept]

    def _change(
        self,
        changes: SiteChanges,
        lambdas: list[float],
        factor: Factor,
        fit: RegressionSpec,
        rank: int,
    ) -> tuple[LowRank, float]:
        lower, jitter = factor.lower.double(), factor.jitter
        _, width = changes.shape
        rows = torch.empty(changes.listed_rank, width, dtype=torch.float64, device=lower.device)
        free, toward = rows, fit.pull_of(changes)
        for concept, change in changes.present.items():
            cross, down = self._cross(concept), change.down.double()
            value, weight = lambdas[concept], fit.weights[concept]
            pull = value * toward * fit.ridge * frobenius(cross)
            pull += jitter * weight / sum(fit.weights)
            own = (1 - fit.shrink) * cross.diagonal().to(down) * value + pull
            product, free = free[: change.rank], free[change.rank :]
            torch.mul(down, own, out=product)
            for part in pieces(cross):
                product.addmm_(down[:, part], cross[part].to(down), alpha=value * fit.shrink)
        down = torch.cholesky_solve(rows.mT, lower).mT
        up = torch.cat([change.up for change in changes.present.values()], dim=1)
        up = up.to(torch.promote_types(up.dtype, torch.float32))
        exact = LowRank(up, down, changes.like.kernel)
        return truncate_factors(exact, rank, lower) if exact.rank > rank else (exact, 0.0)

    def _wanted(self, concept: int, candidate: LowRank) -> tuple[float, Tensor]:
        change = self.changes[concept]
        if change is None:
            return 0.0, candidate.down.new_zeros(candidate.rank)
        change = change.to(device=candidate.down.device)
        crossed = times(change.down.double(), self._cross(concept)) @ candidate.down.mT
        crossed = ((change.up.double().mT @ candidate.up) * crossed).sum(0)
        return self._outputs.energy(concept), crossed


class Gram(AdapterMoments):
    """X̃ᵀX̃ alone, for targets X̃ ΔW_iᵀ: RegMean, where both moments coincide."""

    kind = InputMoments

    def __init__(self, context: SiteContext) -> None:
        super().__init__(context, "none", torch.float32)

    def solve(self, fit: RegressionSpec) -> Solution:
        """``fit.weighting`` is ``tokens`` or ``none``."""
        self.weigher = ByTokens() if fit.weighting == "tokens" else Weigher()
        return super().solve(fit)
