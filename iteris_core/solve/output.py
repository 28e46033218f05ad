"""The official objective: the merged *layer* reproduces LoRA i's layer.

T_i is (W0 + ΔW_i) on X_i minus W0 on X̃_i, so drift from earlier layers is repaired too. The ridge
is ρ_i on both sides: the pull is toward ΔW_i, and no weight is read. ΔW is dense, and is cut in the
metric of M, ‖(ΔW − ΔW_k) M^{1/2}‖_F. If there are many outputs, TᵀX̃ and ΔW are restricted to a few
:mod:`.directions`, D: reduced-rank regression.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg.lowrank import searches, truncate_matrix
from ..linalg.precision import energy, energy_dtype, pieces
from ..lora import LowRank, SiteChanges
from .directions import Directions, every_direction
from .inputs import Factor, InputMoments, times
from .moments import MomentReduction
from .problem import MemoryEstimate, RegressionSpec, SiteContext, Tokens, Weighting
from .weighting import weigher


class OutputMoments(MomentReduction):
    """X̃ᵀX̃ and DᵀTᵀX̃, (directions, in), for every concept."""

    def __init__(
        self,
        context: SiteContext,
        weighting: Weighting,
        dtype: torch.dtype,
        directions: Directions | None = None,
    ) -> None:
        super().__init__(context, InputMoments, weigher(weighting, context, dtype))
        self.directions = directions or every_direction(self.changes.shape[0])
        count, device = len(self.changes), context.device
        shape = (count, self.directions.count, self.inputs.width)
        self.targets = list(torch.zeros(shape, dtype=self.inputs.dtype, device=device))
        self.energies = torch.zeros(count, dtype=energy_dtype(device), device=device)
        """‖T_i‖²_F of the whole T_i"""

    def _add_targets(self, tokens: Tokens) -> None:
        target = tokens.target
        self.energies[tokens.concept] += energy(target)
        self.targets[tokens.concept].addmm_(self.directions.of(target).mT, tokens.merged)

    def _energies(self) -> list[float]:
        return self.energies.tolist()

    def _change(
        self,
        changes: SiteChanges,
        lambdas: list[float],
        factor: Factor,
        fit: RegressionSpec,
        rank: int,
    ) -> tuple[LowRank, float]:
        lower, jitter = factor.cholesky.lower, factor.cholesky.jitter
        right = self._right_side(changes, lambdas, factor, fit)
        if jitter:
            mean = changes.mean(fit.weights, right.dtype)
            right += jitter * (self.directions.within(mean.up) @ mean.down)
        like, search = changes.like.to(torch.float64), self.inputs.dtype
        if not self.directions.some:
            return truncate_matrix(right, rank, lower, like=like, search=search)
        right, others = right.split(self.directions.split)
        rest = torch.linalg.solve_triangular(lower.mT, others, upper=True, left=False)
        elsewhere = float((rest**2).sum()) * self.directions.others_stand_for
        change, lost = truncate_matrix(
            right, rank, lower, like=like, search=search, elsewhere=elsewhere
        )
        up = self.directions.basis.to(change.up) @ change.up
        return LowRank(up, change.down, change.kernel), lost

    def _right_side(
        self, changes: SiteChanges, lambdas: list[float], factor: Factor, fit: RegressionSpec
    ) -> Tensor:
        """DᵀK, (directions, in)."""
        lower = factor.cholesky.lower
        right = torch.zeros(self.targets[0].shape, dtype=lower.dtype, device=lower.device)
        toward = fit.pull_of(changes)
        for concept, (target, value) in enumerate(zip(self.targets, lambdas, strict=True)):
            for rows in pieces(target):
                right[rows].add_(target[rows].to(right.device), alpha=value * fit.shrink)
            change = changes[concept]
            if change is not None:
                pull = toward * fit.ridge * factor.norms[concept]
                pull = pull + (1 - fit.shrink) * self.inputs.own[concept].diagonal().to(right)
                up = self.directions.within(change.up.to(right))
                right.addmm_(up, change.down.to(right) * pull, alpha=value)
        return right

    def _wanted(self, concept: int, candidate: LowRank) -> tuple[float, Tensor]:
        # Both candidates lie within the directions.
        crossed = times(self.directions.within(candidate.up).mT, self.targets[concept])
        return float(self.energies[concept]), (crossed * candidate.down).sum(1)

    @staticmethod
    def bytes(
        changes: SiteChanges, itemsize: int, directions: int | None, dtype: torch.dtype
    ) -> MemoryEstimate:
        """X̃ᵀX̃ and the targets for every concept. The float64 solve needs M and the right side. A
        search for the leading directions also needs M's factor and the right side in the moments'
        precision, and products of that size; using all directions needs six times the right side in
        float64. In float32 everything takes at most half."""
        out, width = changes.shape
        rows = out if directions is None else directions
        kept = len(changes) * width * (width + rows) * itemsize
        shared = len(changes) * width * width * itemsize
        left = shared + width * width * dtype.itemsize
        low = changes.rank * (4 * width + 2 * rows)
        search = searches(rows, width, changes.rank)
        if dtype == torch.float64:
            dense = 12 * width * width + 16 * rows * width
            if not search:
                dense = 8 * width * width + 48 * rows * width
            return MemoryEstimate(kept, dense + 12 * low, left, shared)
        dense = 4 * width * width + (9 if search else 26) * rows * width
        return MemoryEstimate(kept, dense + 6 * low, left, shared)
