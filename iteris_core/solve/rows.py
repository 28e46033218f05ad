"""The objective of :mod:`.output`, solved from rows if they are fewer than the site's inputs.

:mod:`.output` factorises an (in, in) matrix. The same solution for n tokens in total, with rows A =
[√λ_i X̃_i], B = [√λ_i T_i] and ρ = Σ λ_i ρ_i, is

    ΔW = W̄ + Cᵀ A,   C = (A Aᵀ + ρ I)⁻¹ (B − A W̄ᵀ),   W̄ = Σ λ_i ρ_i ΔW_i / ρ

(kernel ridge regression, by the Woodbury identity), needs only an (n, n) matrix. The cut to a rank
is the same as well: ‖ΔW M^{1/2}‖² is the trace of G = ΔW M ΔWᵀ = PᵀP + ρ ΔW ΔWᵀ with P = A ΔWᵀ, so
the best change of rank k is U Uᵀ ΔW with G's k leading eigenvectors.

Precondition: the ridge is above 0, ``shrink`` is 1, and the weighting is by tokens or none. Zero
rows give the mean change, as in :mod:`.output`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import SolveError
from ..linalg.cholesky import CANNOT
from ..linalg.lowrank import cut_factors, leading_eigenvectors
from ..linalg.precision import full_precision, solve_device
from ..lora import LowRank, SiteChanges, concatenate, rank_for
from .inputs import NOT_FINITE
from .problem import Reduction, RegressionSpec, SiteContext, Solution, Tokens, finite_as
from .weighting import token_values


class OutputRows(Reduction):
    """X̃_i, (tokens, in), and T_i, (tokens, out), for every concept, stored directly."""

    def __init__(self, opening: SiteContext, dtype: torch.dtype) -> None:
        super().__init__(opening.changes)
        out, width = self.changes.shape
        empty = torch.empty(0, dtype=dtype, device=opening.device)
        self._inputs = [[empty.new_empty(0, width)] for _ in range(len(self.changes))]
        self._targets = [[empty.new_empty(0, out)] for _ in range(len(self.changes))]

    def add(self, tokens: Tokens) -> None:
        self._inputs[tokens.concept].append(tokens.merged)
        self._targets[tokens.concept].append(tokens.target)

    def solve(self, fit: RegressionSpec) -> Solution:
        """See :class:`.problem.Reduction`; equal to :meth:`.output.OutputMoments.solve`."""
        inputs = [torch.cat(parts) for parts in self._inputs]
        targets = [torch.cat(parts) for parts in self._targets]
        like = self.changes.like
        device = solve_device(inputs[0].device)
        inputs = [part.to(device, fit.dtype) for part in inputs]
        targets = [part.to(device, fit.dtype) for part in targets]
        changes = self.changes.to(fit.dtype, device)
        counts = [float(len(part)) for part in inputs]
        values = token_values(counts) if fit.weighting == "tokens" else [1.0] * len(counts)
        lambdas = fit.lambdas(values)
        with full_precision(device):
            norms = [float(torch.linalg.matrix_norm(part @ part.mT)) for part in inputs]
            energies = [*norms, *(float(part.norm()) for part in targets)]
            if not all(map(math.isfinite, energies)):
                raise SolveError(NOT_FINITE)
            pulls = [value * fit.ridge * norm for value, norm in zip(lambdas, norms, strict=True)]
            solved = _solved(changes, inputs, targets, lambdas, pulls, fit)
            if solved is None:
                return self.solve(replace(fit, dtype=torch.float64))
            change, lost, condition = solved
            solution = Solution(finite_as(change, like), condition=condition, truncated=lost)
            if fit.residuals:
                mean = changes.mean(fit.weights, fit.dtype)
                before = _residuals(mean, changes, inputs, targets)
                after = _residuals(change.to(fit.dtype), changes, inputs, targets)
                solution = replace(solution, before=before, after=after)
        total = sum(lambdas)
        return replace(solution, weighting=tuple(value / total for value in lambdas))


def _solved(
    changes: SiteChanges,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    lambdas: Sequence[float],
    pulls: Sequence[float],
    fit: RegressionSpec,
) -> tuple[LowRank, float, float] | None:
    """ΔW, the share of energy cut off, and an estimate of M's condition number; None if float32 is
    not enough."""
    pull, most = sum(pulls), fit.rank_of(changes)
    if pull <= 0:  # no input energy at all: any change fits, so use the mean
        mean = changes.mean(fit.weights, torch.float64)
        return (*cut_factors(mean, most), math.inf)
    toward = fit.pull_of(changes)
    center = concatenate(changes.weighted([toward * value / pull for value in pulls]))
    rows = torch.cat([x * math.sqrt(v) for x, v in zip(inputs, lambdas, strict=True)])
    wanted = torch.cat([t * math.sqrt(v) for t, v in zip(targets, lambdas, strict=True)])
    gram = rows @ rows.mT
    centered = _outputs(rows, center)
    shifted = gram.clone()
    shifted.diagonal().add_(pull)
    lower, info = torch.linalg.cholesky_ex(shifted)
    if int(info) != 0:
        if rows.dtype == torch.float64:
            raise SolveError(CANNOT)
        return None
    dual = torch.cholesky_solve(wanted - centered, lower)
    fitted = gram @ dual
    # ΔW ΔWᵀ from products with n and out alone
    cross = centered.mT @ dual
    inner = center.up @ (center.down @ center.down.mT) @ center.up.mT
    inner += cross + cross.mT + dual.mT @ fitted
    fitted += centered
    energy = fitted.mT @ fitted + pull * inner
    u, squares = leading_eigenvectors(energy.double(), most)
    keep = rank_for(squares[:most], fit.rank if isinstance(fit.rank, float) else most)
    total = float(energy.diagonal().sum())
    lost = max(0.0, 1.0 - float(squares[:keep].sum()) / total) if total > 0 else 0.0
    u = u[:, :keep]
    left = u.to(rows)
    down = ((left.mT @ center.up) @ center.down + (dual @ left).mT @ rows).double()
    root = down.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    return (
        LowRank(u * root, down / root[:, None], center.kernel),
        lost,
        float(lower.diagonal().max()) ** 2 / pull,
    )


def _residuals(
    candidate: LowRank, changes: SiteChanges, inputs: Sequence[Tensor], targets: Sequence[Tensor]
) -> tuple[float, ...]:
    """‖T_i − X̃_i ΔWᵀ‖ / ‖T_i‖, as in :func:`.inputs.residuals_of`."""
    errors: list[float] = []
    for rows, target in zip(inputs, targets, strict=True):
        left, scale = float((target - _outputs(rows, candidate)).norm()), float(target.norm())
        if scale <= 0:
            others = [float(_outputs(rows, c).norm()) for c in changes.own.values()]
            scale = math.hypot(*others)
        errors.append(left / scale if scale > 0 else 0.0)
    return tuple(errors)


def _outputs(rows: Tensor, change: LowRank) -> Tensor:
    return (rows @ change.down.mT) @ change.up.mT
