"""The closed form of one site: second moments in, one low-rank change out.

Every site solves one ridge regression (paper, eqs. 5 to 8). With rows as tokens,

    M = Σ λ_i (X̃_iᵀX̃_i + ρ_i I),   K = Σ λ_i (T_iᵀX̃_i + ridge · ΔW_i),   ΔW = K M⁻¹,

where ρ_i = α ‖X̃_iᵀX̃_i‖_F. The two objectives differ in the target T_i:

``adapter``
    T_i = X_i ΔW_iᵀ, and the ridge on the right is α ‖X_iᵀX̃_i‖_F ΔW_i (eq. 7). The solution is
    exactly low rank: ``up = [up_1 … up_N]``, ``down = [λ_i down_i C_i] M⁻¹``.
``full``
    T_i is what LoRA i's layer gave minus what the base layer gives on the merged inputs; the ridge
    is ρ_i on both sides, so that it pulls toward ΔW_i. ΔW is dense, and is truncated in the metric
    of M, ‖(ΔW − ΔW_k) M^{1/2}‖_F; where the targets come in a few :mod:`.directions` of the output,
    all of that is within them.

Where tokens are few a second pull, per feature, keeps the fit from following the sample: with
``shrink`` s the off-diagonal entries of X̃_iᵀX̃_i and X_iᵀX̃_i are multiplied by s, as in RegMean, and
T_iᵀX̃_i becomes s T_iᵀX̃_i + (1 − s) ΔW_i diag(X̃_iᵀX̃_i). That is a ridge of (1 − s) / s times each
feature's own energy, toward ΔW_i.

Precondition: moments are finite. M is made positive definite by the ridge; where it is not
(``ridge=0`` and too few tokens) the smallest pull toward the mean change that lets a Cholesky
factorisation through is added. Everything is float64, unless less is asked for. An equivalent for
one concept, without the factors, is ``scipy.linalg.solve(M, K.T, assume_a="pos").T``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import SolveError
from ..linalg.lowrank import cut_factors, cut_matrix
from ..linalg.precision import full_precision, pieces
from ..lora import LowRank, Rank, concatenate
from .factor import NOT_FINITE, factorise, frobenius
from .moments import Factor, SharedInputs, TargetMoments
from .residuals import output_energy, residuals_of

Align = Literal["adapter", "full"]
Balance = Literal["adapter", "tokens", "full", "none"]


@dataclass(frozen=True)
class Solution:
    """A site's change and how well it does.

    Per concept: ``balance`` is λ_i with the concept's weight in it, scaled to sum to 1;
    ``before`` and ``after`` are ‖T_i − X̃_i ΔWᵀ‖_F / ‖T_i‖_F with the mean of the changes and with
    the solution. ``condition`` is the estimate (max/min of the Cholesky diagonal)² of M's condition
    number. ``truncated`` is the share of output energy that the cut to the rank lost.
    """

    change: LowRank
    balance: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    condition: float
    truncated: float


def solve_site(
    changes: Sequence[LowRank | None],
    inputs: SharedInputs,
    targets: Sequence[TargetMoments],
    weights: Sequence[float],
    *,
    align: Align,
    balance: Balance,
    ridge: float,
    shrink: float = 1.0,
    rank: Rank | None,
    residuals: bool = True,
    exact: bool = True,
) -> Solution:
    """Solve one site; all sequences run over the concepts.

    A change of ``None`` stands for a change of zero: that concept's outputs are to stay as they
    are. ``rank=None`` keeps Σ r_i; a share of energy is of the solution at that rank. Without
    ``residuals`` the solution's ``before`` and ``after`` are empty. Without ``exact`` the factor
    and the right side are in the moments' precision, at half the time and memory. Raises
    :class:`SolveError` when a moment is not finite.
    """
    present = [change for change in changes if change is not None]
    like = present[0]
    own = inputs.concepts[0].own
    work = torch.device("cpu") if own.device.type == "mps" else own.device
    dtype = torch.float64 if exact else own.dtype
    changes = [None if c is None else c.to(device=work) for c in changes]
    total_rank = sum(change.rank for change in present)
    share = rank if isinstance(rank, float) else None
    rank = min(rank if isinstance(rank, int) else total_rank, *like.shape)

    _check_finite(targets)
    lambdas = _balance(changes, inputs, targets, weights, balance)
    with full_precision(work):
        (factor,) = factorise([(inputs, lambdas)], ridge, shrink, dtype)
        solution, lost = _solution(
            changes, inputs, targets, lambdas, weights, factor, align, ridge, shrink, rank
        )
    chol = factor.cholesky
    if share is not None:
        solution, more = cut_factors(solution, share, chol)
        lost = 1 - (1 - lost) * (1 - more)
    condition = math.inf
    if chol is not None:
        diagonal = chol.diagonal()
        condition = float((diagonal.max() / diagonal.min()) ** 2)

    change = finite_as(solution, like)
    before, after = (), ()
    if residuals:
        mean = mean_change(changes, weights, torch.float64)
        before, after = residuals_of(mean, solution.to(torch.float64), changes, inputs, targets)
    share = sum(lambdas)
    return Solution(
        change, tuple(value / share for value in lambdas), before, after, condition, lost
    )


def _solution(
    changes: Sequence[LowRank | None],
    inputs: SharedInputs,
    targets: Sequence[TargetMoments],
    lambdas: Sequence[float],
    weights: Sequence[float],
    factor: Factor,
    align: Align,
    ridge: float,
    shrink: float,
    rank: int,
) -> tuple[LowRank, float]:
    """ΔW at ``rank``, and the share of energy that the cut lost."""
    if factor.cholesky is None:  # no input energy at all: any change fits, so take the mean
        mean = mean_change(changes, weights, torch.float64)
        return cut_factors(mean, rank) if mean.rank > rank else (mean, 0.0)
    if align == "adapter":
        exact = _solve_adapter(changes, inputs, lambdas, weights, factor, ridge, shrink)
        return cut_factors(exact, rank, factor.cholesky) if exact.rank > rank else (exact, 0.0)
    directions = targets[0].directions
    right = _full_right_side(changes, inputs, targets, lambdas, factor, ridge, shrink)
    if factor.jitter:
        mean = mean_change(changes, weights, right.dtype)
        right += factor.jitter * (targets[0].within(mean.up) @ mean.down)
    like = next(c for c in changes if c is not None).to(torch.float64)
    search = targets[0].dtype
    if directions is None:
        return cut_matrix(right, rank, factor.cholesky, like=like, search=search)
    right, others = right.split([directions.used, len(right) - directions.used])
    rest = torch.linalg.solve_triangular(factor.cholesky.mT, others, upper=True, left=False)
    elsewhere = float((rest**2).sum()) * directions.others_stand_for
    change, lost = cut_matrix(
        right, rank, factor.cholesky, like=like, search=search, elsewhere=elsewhere
    )
    return LowRank(directions.basis.to(change.up) @ change.up, change.down, change.kernel), lost


def finite_as(solution: LowRank, like: LowRank) -> LowRank:
    """``solution`` in the dtype and on the device of ``like``; raises where it is not finite."""
    change = solution.to(like.up.dtype, like.up.device)
    if not (bool(torch.isfinite(change.up).all()) and bool(torch.isfinite(change.down).all())):
        raise SolveError("the solution is not finite; raise `ridge`.")
    return change


def _check_finite(targets: Sequence[TargetMoments]) -> None:
    """One number tells of a whole tensor: the energy of a NaN or an infinity is none."""
    energies = [part.target_energy for part in targets if part.target is not None]
    energies += [part.full_energy for part in targets if part.full_energy is not None]
    if not all(math.isfinite(float(energy)) for energy in energies):
        raise SolveError(NOT_FINITE)


def _balance(
    changes: Sequence[LowRank | None],
    inputs: SharedInputs,
    targets: Sequence[TargetMoments],
    weights: Sequence[float],
    balance: Balance,
) -> list[float]:
    """λ_i times the concept's weight. A common factor does not matter: the ridge is relative."""
    values: list[float] = []
    for index, (change, shared, target) in enumerate(
        zip(changes, inputs.concepts, targets, strict=True)
    ):
        value = 1.0
        if balance == "tokens":
            value = 1.0 / max(shared.tokens, 1)
        elif balance == "full":
            assert target.full_energy is not None
            value = _inverse(1.0, float(target.full_energy))
        elif balance == "adapter":
            if change is not None and target.down_gram is not None:
                up = change.up.double()
                energy = float((target.down_gram.to(up) * (up.mT @ up)).sum())
                value = _inverse(change.squared_norm(), energy)
            else:
                value = _gain_of_others(index, changes, shared.own)
        values.append(value * weights[index])
    return scaled_lambdas(values, weights)


def scaled_lambdas(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """λ_i times weights so that the largest is 1; the weights where all are 0."""
    largest = max(values)
    if largest <= 0:
        return [float(weight) for weight in weights]
    return [value / largest for value in values]


def _gain_of_others(index: int, changes: Sequence[LowRank | None], own: Tensor) -> float:
    """Eq. 8 for a concept without a change here: that of the others' changes on its inputs."""
    others = [c for i, c in enumerate(changes) if c is not None and i != index]
    norm = sum(change.squared_norm() for change in others)
    energy = sum(output_energy(change, own) for change in others)
    return _inverse(norm, energy)


def _inverse(norm: float, energy: float) -> float:
    return norm / energy if energy > 0 and norm > 0 else 1.0


def mean_change(
    changes: Sequence[LowRank | None], weights: Sequence[float], dtype: torch.dtype
) -> LowRank:
    """Σ w_i ΔW_i / Σ w_i, exactly."""
    total = sum(weights)
    return concatenate(
        [
            change.to(dtype).scaled(weight / total)
            for change, weight in zip(changes, weights, strict=True)
            if change is not None
        ]
    )


def _solve_adapter(
    changes: Sequence[LowRank | None],
    inputs: SharedInputs,
    lambdas: Sequence[float],
    weights: Sequence[float],
    factor: Factor,
    ridge: float,
    shrink: float,
) -> LowRank:
    assert factor.cholesky is not None
    present = [change for change in changes if change is not None]
    rank, width = sum(change.rank for change in present), present[0].shape[1]
    rows = torch.empty(rank, width, dtype=torch.float64, device=factor.cholesky.device)
    free = rows
    for change, part, value, weight in zip(changes, inputs.concepts, lambdas, weights, strict=True):
        if change is None:
            continue
        assert part.cross is not None
        cross, down = part.cross, change.down.double()
        pull = value * ridge * frobenius(cross) + factor.jitter * weight / sum(weights)
        own = (1 - shrink) * cross.diagonal().to(down) * value + pull
        product, free = free[: change.rank], free[change.rank :]
        torch.mul(down, own, out=product)
        for some in pieces(cross):
            product.addmm_(down[:, some], cross[some].to(down), alpha=value * shrink)
    down = torch.cholesky_solve(rows.mT, factor.cholesky).mT
    up = torch.cat([change.up for change in present], dim=1)
    return LowRank(up.to(torch.promote_types(up.dtype, torch.float32)), down, present[0].kernel)


def _full_right_side(
    changes: Sequence[LowRank | None],
    inputs: SharedInputs,
    targets: Sequence[TargetMoments],
    lambdas: Sequence[float],
    factor: Factor,
    ridge: float,
    shrink: float,
) -> Tensor:
    chol = factor.cholesky
    assert chol is not None
    first = targets[0].target
    assert first is not None
    right = torch.zeros(first.shape, dtype=chol.dtype, device=chol.device)
    for change, part, norm, target, value in zip(
        changes, inputs.concepts, factor.norms, targets, lambdas, strict=True
    ):
        assert target.target is not None
        for rows in pieces(target.target):
            right[rows].add_(target.target[rows].to(right.device), alpha=value * shrink)
        if change is not None:
            pull = ridge * norm + (1 - shrink) * part.own.diagonal().to(right)
            up = target.within(change.up.to(right))
            right.addmm_(up, change.down.to(right) * pull, alpha=value)
    return right
