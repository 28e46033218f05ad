"""The closed form of one site from its rows, where they are fewer than the site's inputs.

:mod:`.solve` makes an (in, in) matrix and factorises it. The same solution of ``align="full"`` for
n tokens in all, with rows A = [√λ_i X̃_i], B = [√λ_i T_i] and ρ = Σ λ_i ρ_i, is

    ΔW = W̄ + Cᵀ A,   C = (A Aᵀ + ρ I)⁻¹ (B − A W̄ᵀ),   W̄ = Σ λ_i ρ_i ΔW_i / ρ

(kernel ridge regression, by the identity of Woodbury): an (n, n) matrix. The cut to a rank is the
same as well: ‖ΔW M^{1/2}‖² is the trace of G = ΔW M ΔWᵀ = PᵀP + ρ ΔW ΔWᵀ with P = A ΔWᵀ, so that
the best change of rank k is U Uᵀ ΔW with G's k leading eigenvectors.

Precondition: the ridge is above 0. Rows of zeros give the mean change, as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SolveError
from ..linalg.lowrank import cut_factors, leading_eigenvectors
from ..linalg.precision import full_precision
from ..lora import LowRank, Rank, concatenate, rank_for
from .factor import NOT_FINITE
from .site import Balance, Solution, finite_as, mean_change, scaled_lambdas


def rows_are_fewer(tokens: int, out: int, width: int) -> bool:
    """Whether ``tokens`` rows take less than a third of the operations of the (in, in) moments."""
    by_rows = tokens**2 * (width + 2 * out) + 3 * tokens * out**2
    moments = tokens * width * (width // 2 + out) + width**3 // 3 + out * width**2
    return 3 * by_rows < moments


@dataclass
class SiteRows:
    """Of every concept X̃_i, (tokens, in), and T_i, (tokens, out), on one device, in one dtype."""

    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]


def solve_rows(
    changes: Sequence[LowRank | None],
    rows: SiteRows,
    weights: Sequence[float],
    *,
    balance: Balance,
    ridge: float,
    rank: Rank | None,
    residuals: bool = True,
    exact: bool = True,
) -> Solution:
    """:func:`.solve.solve_site` with ``align="full"`` for ``rows``; ``balance`` is ``tokens`` or
    ``none``. Without ``exact`` it is in the rows' precision where that is enough. Raises
    :class:`SolveError` where a row is not finite."""
    present = [change for change in changes if change is not None]
    like = present[0]
    total_rank = sum(change.rank for change in present)
    most = min(rank if isinstance(rank, int) else total_rank, *like.shape)
    work = torch.device("cpu") if rows.inputs[0].device.type == "mps" else rows.inputs[0].device
    dtype = torch.float64 if exact else rows.inputs[0].dtype
    inputs = [part.to(work, dtype) for part in rows.inputs]
    targets = [part.to(work, dtype) for part in rows.targets]
    changes = [None if c is None else c.to(dtype, work) for c in changes]

    shares = [1.0 / max(len(part), 1) if balance == "tokens" else 1.0 for part in inputs]
    lambdas = scaled_lambdas([s * w for s, w in zip(shares, weights, strict=True)], weights)
    with full_precision(work):
        norms = [float(torch.linalg.matrix_norm(part @ part.mT)) for part in inputs]
        finite = all(map(math.isfinite, norms))
        if not finite or not all(math.isfinite(float(part.norm())) for part in targets):
            raise SolveError(NOT_FINITE)
        pulls = [value * ridge * norm for value, norm in zip(lambdas, norms, strict=True)]
        if sum(pulls) <= 0:  # no input energy at all: any change fits, so take the mean
            mean = mean_change(changes, weights, torch.float64)
            found = (*cut_factors(mean, most), math.inf)
        else:
            found = _solution(changes, inputs, targets, lambdas, pulls, rank, most)
        if found is None:
            return solve_rows(
                changes, rows, weights, balance=balance, ridge=ridge, rank=rank, residuals=residuals
            )
        solution, lost, condition = found
        change = finite_as(solution, like)
        before, after = (), ()
        if residuals:
            before = _residuals(mean_change(changes, weights, dtype), changes, inputs, targets)
            after = _residuals(solution.to(dtype), changes, inputs, targets)
    share = sum(lambdas)
    return Solution(change, tuple(v / share for v in lambdas), before, after, condition, lost)


def _solution(
    changes: Sequence[LowRank | None],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    lambdas: Sequence[float],
    pulls: Sequence[float],
    rank: Rank | None,
    most: int,
) -> tuple[LowRank, float, float] | None:
    """ΔW, the share of energy that was cut off, and about M's condition number; None where float32
    is not enough."""
    pull = sum(pulls)
    center = concatenate(
        [c.scaled(p / pull) for c, p in zip(changes, pulls, strict=True) if c is not None]
    )
    rows = torch.cat([x * math.sqrt(v) for x, v in zip(inputs, lambdas, strict=True)])
    wanted = torch.cat([t * math.sqrt(v) for t, v in zip(targets, lambdas, strict=True)])
    gram = rows @ rows.mT
    centered = _outputs(rows, center)
    shifted = gram.clone()
    shifted.diagonal().add_(pull)
    chol, info = torch.linalg.cholesky_ex(shifted)
    if int(info) != 0:
        if rows.dtype == torch.float64:
            raise SolveError("the normal equations cannot be factorised; raise `ridge`.")
        return None
    dual = torch.cholesky_solve(wanted - centered, chol)
    fitted = gram @ dual
    # ΔW ΔWᵀ from products with n and out alone
    cross = centered.mT @ dual
    inner = center.up @ (center.down @ center.down.mT) @ center.up.mT
    inner += cross + cross.mT + dual.mT @ fitted
    fitted += centered
    energy = fitted.mT @ fitted + pull * inner
    u, squares = leading_eigenvectors(energy.double(), most)
    keep = rank_for(squares[:most], rank if isinstance(rank, float) else most)
    total = float(energy.diagonal().sum())
    lost = max(0.0, 1.0 - float(squares[:keep].sum()) / total) if total > 0 else 0.0
    u = u[:, :keep]
    left = u.to(rows)
    down = ((left.mT @ center.up) @ center.down + (dual @ left).mT @ rows).double()
    root = down.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    return (
        LowRank(u * root, down / root[:, None], center.kernel),
        lost,
        float(chol.diagonal().max()) ** 2 / pull,
    )


def _residuals(
    candidate: LowRank,
    changes: Sequence[LowRank | None],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
) -> tuple[float, ...]:
    """‖T_i − X̃_i ΔWᵀ‖ / ‖T_i‖, as :mod:`.solve` reports them."""
    found: list[float] = []
    for rows, target in zip(inputs, targets, strict=True):
        left, wanted = float((target - _outputs(rows, candidate)).norm()), float(target.norm())
        if wanted <= 0:
            others = [float(_outputs(rows, c).norm()) for c in changes if c is not None]
            wanted = math.hypot(*others)
        found.append(left / wanted if wanted > 0 else 0.0)
    return tuple(found)


def _outputs(rows: Tensor, change: LowRank) -> Tensor:
    return (rows @ change.down.mT) @ change.up.mT
