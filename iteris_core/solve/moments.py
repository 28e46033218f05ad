"""Reductions to input moments, for the two objectives.

With ``output`` the *layer* reproduces LoRA i's layer. T_i is (W0 + ΔW_i) on X_i minus W0 on X̃_i,
so drift from earlier layers is repaired too. The ridge is ρ_i on both sides: the pull is toward
ΔW_i, and no weight is read. ΔW is dense, and is cut in the metric of M, ‖(ΔW − ΔW_k) M^{1/2}‖_F.

If there are many outputs, TᵀX̃ and ΔW are restricted to a few directions D of the outputs. A change
uses as many as its rank. The candidates are those of the LoRAs' own changes, [up_1 … up_N], and the
principal directions of the targets T on a sample of tokens. Reduced-rank regression (Izenman 1975)
within them is as good on held-out rows as with all directions (docs/decisions.md).

With ``adapter``, the paper's objective, the merged change reproduces each LoRA's change, T_i =
X_i ΔW_iᵀ. The ridge on the right-hand side is τ α ‖X_iᵀX̃_i‖_F ΔW_i (eq. 7, with τ = 1). The
solution is exactly low rank: ``up = [up_1 … up_N]``, ``down = [λ_i down_i C_i] M⁻¹`` with C_i =
X_iᵀX̃_i + ridge: Σ r_i right-hand sides, no dense ΔW and no SVD. Without factors it is equivalent
to ``scipy.linalg.solve(M, K.T, assume_a="pos").T``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..activations.tokens import Observation
from ..errors import SolveError
from ..linalg import (
    Sketch,
    cut,
    energy,
    energy_dtype,
    frobenius,
    full_precision,
    leading_eigenvectors,
    on_host,
    pieces,
    searches,
    sketch,
    sketch_factors,
    solve_device,
    truncate_factors,
)
from ..lora import LowRank, SiteChanges, concatenate
from .inputs import NOT_FINITE, CrossMoments, Factor, InputMoments, times
from .problem import (
    MemoryEstimate,
    Reduction,
    RegressionSpec,
    SiteContext,
    Solution,
    Weigher,
    Weighting,
    finite_as,
)

_PIECE = 1 << 21  # bytes of a moment during conversion to float64, see linalg.pieces
_LEAST_RIDGE = 1e-9  # above none at all, where a bound is to be kept


class MomentReduction(Reduction):
    """X̃ᵀX̃ for every concept, of class ``inputs``, plus a subclass's data about the targets.
    ``weightings`` are those of which the solve uses one."""

    inputs: InputMoments

    def __init__(
        self, context: SiteContext, inputs: type[InputMoments], weightings: set[Weighting]
    ) -> None:
        super().__init__(context.changes)
        self.inputs, self._adds = context.share(inputs)
        self.weigher = Weigher(weightings, context)

    def add(self, tokens: Observation) -> None:
        with full_precision(self.inputs.own[0].device):
            if self._adds:
                self._add_inputs(tokens)
            self.weigher.add(tokens)
            self._add_targets(tokens)

    def solve(self, fit: RegressionSpec) -> Solution:
        """See :class:`.problem.Reduction`; a share of energy as rank refers to the solution at Σ
        r_i. If no input has energy, any change fits, and the mean of the changes is used."""
        device = solve_device(self.inputs.own[0].device)
        changes, like = self.changes.to(device=device), self.changes.like
        energies = self._energies().to(device)
        rank = min(fit.rank if isinstance(fit.rank, int) else changes.rank, *changes.shape)
        lambdas = fit.lambdas(self.weigher.values(fit.weighting, self.inputs))
        if float(self.inputs.tokens.max()) >= fit.shrinks_below * self.inputs.width:
            fit = replace(fit, shrink=1.0)
        while True:
            factor = self.inputs.factor(lambdas, fit.ridge, fit.shrink, fit.dtype)
            with full_precision(device):
                sketch = self._change(changes, factor, fit, rank)
            # The only time that a solve waits for the device.
            *sketch, read, checks = on_host([*sketch, energies, factor.checks])
            if not bool(read.isfinite().all()):
                raise SolveError(NOT_FINITE)
            usable = self.inputs.can_use(factor, checks.tolist())
            if usable is None:
                mean = self.changes.mean(fit.weights, torch.float64)
                change, lost = truncate_factors(mean, rank)
                break
            if not usable:
                continue
            share = fit.rank if isinstance(fit.rank, float) else rank
            change, lost = cut(sketch, share, rank)
            change = replace(change, kernel=like.kernel)
            del sketch
            over = change.squared_norm() ** 0.5 / fit.bound
            if not over > 1:
                break
            if fit.ridge >= 1:
                change = change.scaled(1 / over)
                break
            fit = replace(fit, ridge=max(3 * fit.ridge, _LEAST_RIDGE))
            del factor, change  # before the next ones are made
            self.inputs.forget_factor()
        total = sum(lambdas)
        solution = Solution(
            finite_as(change, like),
            tuple(value / total for value in lambdas),
            truncated=lost,
        )
        if not fit.residuals:
            return solution
        mean = changes.mean(fit.weights, torch.float64)
        errors = self._residuals(mean, change.to(torch.float64, device), changes)
        return replace(solution, errors=errors)

    def _residuals(self, mean: LowRank, solution: LowRank, changes: SiteChanges) -> Tensor:
        """‖T_i − X̃_i ΔWᵀ‖ / ‖T_i‖ for every concept, with the mean and with the solution, (2,
        concepts), from rank × rank products with finite, completed moments. If T_i is zero, it is
        relative to the LoRAs' own changes there. Everything is float64, except products with the
        moments."""
        errors: list[Tensor] = []
        sizes, ranks = [mean.rank, solution.rank], [c.rank for c in changes.own.values()]
        both = concatenate([mean, solution])  # expensive products are computed once for both
        downs = both.down.split(sizes)
        grams = [up.mT @ up for up in both.up.split(sizes, dim=1)]
        for concept, own in enumerate(self.inputs.own):
            target, crossed = self._wanted(concept, both)
            weighted = times(both.down, own).split(sizes)
            double = (change.to(torch.float64) for change in changes.own.values())
            # The mean has the changes side by side.
            parts = zip(weighted[0].split(ranks), double, strict=True)
            others = sum(((r @ c.down.mT) * (c.up.mT @ c.up)).sum() for r, c in parts)
            scale = torch.where(target > 0, target, others)
            for rows, down, gram, cross in zip(
                weighted, downs, grams, crossed.split(sizes), strict=True
            ):
                left = (target - 2 * cross.sum() + ((rows @ down.mT) * gram).sum()).clamp(min=0)
                errors.append(torch.where(scale > 0, (left / scale).sqrt(), 0.0))
        return torch.stack(errors).unflatten(0, (-1, 2)).mT

    def _add_inputs(self, tokens: Observation) -> None:
        self.inputs.add(tokens.concept, tokens.merged)

    def _add_targets(self, tokens: Observation) -> None:
        """Add what the targets need beyond the inputs and the weigher's sums."""

    @abstractmethod
    def _change(
        self, changes: SiteChanges, factor: Factor, fit: RegressionSpec, rank: int
    ) -> Sketch:
        """ΔW, to be cut to ``rank``."""

    @abstractmethod
    def _wanted(self, concept: int, candidate: LowRank) -> tuple[Tensor, Tensor]:
        """‖T_i‖² and, per component of the candidate, tr(T_iᵀ X̃_i ΔWᵀ)."""

    def _energies(self) -> Tensor:
        """Energies of whole tensors, which reveal NaN and infinite values."""
        return self.inputs.own[0].new_zeros(0)


OTHERS = 8
"""Random extra directions, to estimate what the used ones leave out."""


@dataclass(frozen=True)
class Directions:
    """Orthonormal columns in a site's outputs, (out, k + q): a change may use the first k,
    ``used``; the other q, chosen at random, estimate the energy in the rest of the outputs."""

    matrix: Tensor
    used: int


def find_directions(changes: SiteChanges, targets: Sequence[Tensor], count: int) -> Directions:
    """At most ``count`` directions, from a sample of ``targets`` T for every concept, (tokens,
    out); and a few others. Concepts count equally, however many tokens they have."""
    tokens = torch.cat([rows / max(len(rows), 1) ** 0.5 for rows in targets])
    device = tokens.device
    if device.type == "mps":  # it has no QR
        tokens = tokens.cpu()
    own = [change for change in changes.own.values() if not change.is_zero]
    ups = [change.to(tokens.dtype, tokens.device).up for change in own]
    parts: list[Tensor] = []
    with full_precision(tokens.device):
        if ups:
            parts.append(torch.linalg.qr(torch.cat(ups, dim=1)).Q[:, :count])
            tokens = tokens - (tokens @ parts[0]) @ parts[0].mT
        left = count - sum(part.shape[1] for part in parts)
        if left > 0 and len(tokens):
            vectors, values = leading_eigenvectors((tokens @ tokens.mT).double(), left)
            left = int((values[:left] > values[0] * 1e-12).sum())
            parts.append(tokens.mT @ vectors[:, :left].to(tokens))
        used = sum(part.shape[1] for part in parts)
        out = tokens.shape[1]
        generator = torch.Generator().manual_seed(0)
        others = torch.randn(out, min(OTHERS, out - used), generator=generator)
        others = others.to(tokens, non_blocking=tokens.is_cuda)
        parts = [part / part.norm(dim=0).clamp(min=1e-30) for part in (*parts, others)]
        return Directions(torch.linalg.qr(torch.cat(parts, dim=1)).Q.to(device), used)


class OutputMoments(MomentReduction):
    """X̃ᵀX̃ and DᵀTᵀX̃, (directions, in), for every concept; without ``directions``, TᵀX̃."""

    def __init__(
        self,
        context: SiteContext,
        weighting: Weighting = "none",
        directions: Directions | None = None,
    ) -> None:
        super().__init__(context, InputMoments, {weighting})
        self._directions = directions
        rows = self.changes.shape[0] if directions is None else directions.matrix.shape[1]
        count, device = len(self.changes), context.device
        shape = (count, rows, self.inputs.width)
        self.targets = list(torch.zeros(shape, dtype=self.inputs.dtype, device=device))
        self.energies = torch.zeros(count, dtype=energy_dtype(device), device=device)
        """‖T_i‖²_F of the whole T_i"""

    def _add_targets(self, tokens: Observation) -> None:
        target = tokens.target
        self.energies[tokens.concept] += energy(target)
        if self._directions is not None:
            target = target @ self._directions.matrix
        self.targets[tokens.concept].addmm_(target.mT, tokens.merged)

    def _within(self, up: Tensor) -> Tensor:
        """Dᵀ up for ``up``, (out, rank)."""
        return up if self._directions is None else self._directions.matrix.to(up).mT @ up

    def _energies(self) -> Tensor:
        return self.energies

    def _change(
        self, changes: SiteChanges, factor: Factor, fit: RegressionSpec, rank: int
    ) -> Sketch:
        lower, toward = factor.lower, fit.pull_of(self.changes)
        right = torch.zeros(self.targets[0].shape, dtype=lower.dtype, device=lower.device)  # DᵀK
        for concept, (target, value) in enumerate(zip(self.targets, factor.lambdas, strict=True)):
            for rows in pieces(target):
                right[rows].add_(target[rows].to(right.device), alpha=value * fit.shrink)
            change = changes[concept]
            if change is not None:
                pull = toward * fit.ridge * factor.norms[concept]
                pull = pull + (1 - fit.shrink) * self.inputs.own[concept].diagonal().to(right)
                up = self._within(change.up.to(right))
                right.addmm_(up, change.down.to(right) * pull, alpha=value)
        if factor.jitter:
            mean = changes.mean(fit.weights, right.dtype)
            right += factor.jitter * (self._within(mean.up) @ mean.down)
        search = self.inputs.dtype
        if self._directions is None:
            return sketch(right, rank, lower, search=search)
        matrix, used = self._directions.matrix, self._directions.used
        out, count = matrix.shape
        right, others = right.split([used, count - used])
        rest = torch.linalg.solve_triangular(lower.mT, others, upper=True, left=False)
        # Each of the others stands for so many directions.
        elsewhere = (rest**2).sum().double() * ((out - used) / max(count - used, 1))
        within = sketch(right, rank, lower, search=search, elsewhere=elsewhere)
        return within._replace(left=matrix[:, :used].to(within.left) @ within.left)

    def _wanted(self, concept: int, candidate: LowRank) -> tuple[Tensor, Tensor]:
        # Both candidates lie within the directions.
        crossed = times(self._within(candidate.up).mT, self.targets[concept])
        return self.energies[concept].to(crossed), (crossed * candidate.down).sum(1)

    @staticmethod
    def bytes(
        changes: SiteChanges,
        itemsize: int = 4,
        directions: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> MemoryEstimate:
        """The float64 solve needs M and the right side; a search for the leading directions also
        M's factor and the right side in the moments' precision, and products of that size; all
        directions six times the right side. In float32 everything takes at most half."""
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


class AdapterMoments(MomentReduction):
    """X̃ᵀX̃ and, for targets T_i = X ΔW_iᵀ, XᵀX̃ for every concept."""

    kind: ClassVar[type[InputMoments]] = CrossMoments

    def __init__(self, context: SiteContext, weighting: Weighting = "none") -> None:
        super().__init__(context, self.kind, {weighting, "adapter"})

    def _add_inputs(self, tokens: Observation) -> None:
        super()._add_inputs(tokens)
        if isinstance(self.inputs, CrossMoments):
            self.inputs.cross[tokens.concept].addmm_(tokens.reference.mT, tokens.merged)

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
        self, changes: SiteChanges, factor: Factor, fit: RegressionSpec, rank: int
    ) -> Sketch:
        lower, jitter = factor.lower.double(), factor.jitter
        _, width = changes.shape
        rows = torch.empty(changes.listed_rank, width, dtype=torch.float64, device=lower.device)
        free, toward = rows, fit.pull_of(self.changes)
        for concept, change in changes.present.items():
            cross, down = self._cross(concept), change.down.double()
            value, weight = factor.lambdas[concept], fit.weights[concept]
            pull = value * toward * fit.ridge * frobenius(cross)
            pull += jitter * weight / sum(fit.weights)
            own = (1 - fit.shrink) * cross.diagonal().to(down) * value + pull
            product, free = free[: change.rank], free[change.rank :]
            torch.mul(down, own, out=product)
            for part in pieces(cross):
                product.addmm_(down[:, part], cross[part].to(down), alpha=value * fit.shrink)
        down = torch.cholesky_solve(rows.mT, lower).mT
        up = torch.cat([change.up for change in changes.present.values()], dim=1)
        if len(down) > rank or isinstance(fit.rank, float):
            return sketch_factors(up, down, lower)
        return Sketch(up.double(), down, rows.new_zeros(0), rows.new_zeros(()))

    def _wanted(self, concept: int, candidate: LowRank) -> tuple[Tensor, Tensor]:
        change = self.changes[concept]
        if change is None:
            zeros = candidate.down.new_zeros(candidate.rank + 1)
            return zeros[0], zeros[1:]
        change = change.to(device=candidate.down.device)
        crossed = times(change.down.double(), self._cross(concept)) @ candidate.down.mT
        crossed = ((change.up.double().mT @ candidate.up) * crossed).sum(0)
        return self.weigher.energy(concept).to(crossed), crossed


class Gram(AdapterMoments):
    """X̃ᵀX̃ alone, for targets X̃ ΔW_iᵀ: RegMean, where both moments coincide. The weighting is
    ``tokens`` or ``none``."""

    kind = InputMoments
