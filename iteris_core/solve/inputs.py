"""Second moments of a site's inputs per concept, and the factor of M.

Sites that receive the same tensor share the moments, and with them the factor. M is added to zeros
and factorised in place, so no second copy exists. Single precision suffices if the factor solves
with at least one correct digit in every direction; one refinement step on a probe checks this.
Otherwise, or if it fails, double precision is used. If M is singular even then, the smallest
multiple of the identity that allows a factorisation is added. For a nonsingular M this equals
``torch.linalg.cholesky``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SolveError
from ..linalg.precision import frobenius, full_precision, pieces, solve_device
from ..lora import LowRank, SiteChanges, concatenate

_ERROR = 0.1  # relative change of a probe's solution; above it single precision is not enough
_NOT_FINITE = "the normal equations are not finite; lower the concepts' weights."
CANNOT = "the normal equations cannot be factorised; raise `ridge`."


@dataclass(frozen=True)
class Cholesky:
    """``lower`` is L with L Lᵀ = M + ``jitter`` · I, (n, n)."""

    lower: Tensor
    jitter: float = 0.0

    @property
    def condition(self) -> float:
        """An estimate of M's condition number: (max / min of the diagonal)²."""
        diagonal = self.lower.diagonal()
        return float((diagonal.max() / diagonal.min()) ** 2)


def factorise(
    add: Callable[[Tensor], None],
    times: Callable[[Tensor], Tensor],
    size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    step: float,
) -> Cholesky | None:
    """The factor of M; ``add(zeros)`` adds M to an (n, n) matrix. None if M is zero.

    ``times(v)`` is M v in float64 for a probe v, (n,). ``dtype`` is float32 or float64; the factor
    has that dtype, or float64 if float32 is not precise enough. ``step`` is the first multiple of I
    to try, relative to the mean of M's diagonal. Raises :class:`SolveError` if M still has no
    factor.
    """
    matrix = torch.zeros(size, size, dtype=dtype, device=device)
    add(matrix)
    trace = float(matrix.diagonal().sum())
    if trace <= 0:
        return None
    if not math.isfinite(trace):
        raise SolveError(_NOT_FINITE)
    # In place: LAPACK's order of entries is that of the transpose, and M is symmetric.
    info = torch.zeros((), dtype=torch.int32, device=device)
    lower, _ = torch.linalg.cholesky_ex(matrix.mT, out=(matrix.mT, info))
    if dtype != torch.float64:
        if int(info) == 0 and _has_digits(lower, times):
            return Cholesky(lower)
        del matrix, lower
        return factorise(add, times, size, dtype=torch.float64, device=device, step=step)
    if int(info) == 0:
        return Cholesky(lower)
    matrix.zero_()
    add(matrix)
    return _with_jitter(matrix, trace, step * trace / size)


def _has_digits(lower: Tensor, times: Callable[[Tensor], Tensor]) -> bool:
    """True if M x = v, solved with the factor for a probe v of signs, has a correct digit.

    The probe has a component in every direction, so its solution is dominated by the smallest
    eigenvalues, where digits are lost first.
    """
    generator = torch.Generator(device=lower.device).manual_seed(0)
    signs = torch.randint(0, 2, (len(lower),), generator=generator, device=lower.device)
    probe = (2 * signs - 1).double()
    solution = torch.cholesky_solve(probe.to(lower)[:, None], lower)[:, 0]
    left = probe - times(solution.double())
    correction = torch.cholesky_solve(left.to(lower)[:, None], lower)[:, 0]
    return float(correction.norm()) <= _ERROR * float(solution.norm())


def _with_jitter(matrix: Tensor, trace: float, step: float) -> Cholesky:
    jitter = 0.0
    while True:
        matrix.diagonal().add_(step)
        jitter += step
        step *= 10
        if jitter > trace:
            raise SolveError(CANNOT)
        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            return Cholesky(lower, jitter)


NOT_FINITE = "its inputs or outputs contain NaN or infinite values; try a base model in float32."


@dataclass(frozen=True)
class Factor:
    """The factor of M = Σ λ_i (X̃_iᵀX̃_i + ρ_i I), with ‖X̃_iᵀX̃_i‖_F for every concept."""

    cholesky: Cholesky
    norms: Sequence[float]


class InputMoments:
    """X̃_iᵀX̃_i for every concept, (in, in) each; ``tokens`` counts tokens.

    While tokens are added, only the upper block triangle is valid; :meth:`complete` mirrors it.
    """

    def __init__(self, concepts: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (concepts, width, width)
        self.own = list(torch.zeros(shape, dtype=dtype, device=device))
        self.tokens = torch.zeros(concepts, dtype=torch.float64)
        self._whole = True
        self._factors: dict[tuple[object, ...], Factor | None] = {}

    @property
    def width(self) -> int:
        return len(self.own[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.own[0].dtype

    def add(self, concept: int, merged: Tensor) -> None:
        """``merged`` is X̃, (tokens, in), in the moments' dtype."""
        own = self.own[concept]
        block = _block(self.width, own.device)
        for start in range(0, self.width, block):
            rows = slice(start, start + block)
            own[rows, start:].addmm_(merged[:, rows].mT, merged[:, start:])
        self._whole = self.width <= block
        self.forget_factor()
        self.tokens[concept] += len(merged)

    def complete(self) -> None:
        """Mirror the upper block triangles."""
        if self._whole:
            return
        block = _block(self.width, self.own[0].device)
        for own in self.own:
            for stop in range(block, self.width, block):
                rows = slice(stop - block, stop)
                own[stop:, rows] = own[rows, stop:].mT
        self._whole = True

    def forget_factor(self) -> None:
        """Drop the factor; the next site computes it again."""
        self._factors.clear()

    def factor(
        self, lambdas: Sequence[float], ridge: float, shrink: float, dtype: torch.dtype
    ) -> Factor | None:
        """The factor of M, cached for the next site that needs it; None if no input has energy.

        Off-diagonal entries of X̃_iᵀX̃_i are multiplied by ``shrink``. Raises :class:`SolveError`
        if a moment is not finite, or M cannot be factorised.
        """
        self.complete()
        key = (*lambdas, ridge, shrink, dtype)
        if key not in self._factors:
            self._factors = {key: self._factorised(lambdas, ridge, shrink, dtype)}
        return self._factors[key]

    def _factorised(
        self, lambdas: Sequence[float], ridge: float, shrink: float, dtype: torch.dtype
    ) -> Factor | None:
        norms = [frobenius(own) for own in self.own]
        if not all(map(math.isfinite, norms)):
            raise SolveError(NOT_FINITE)
        pulls = [value * ridge * norm for value, norm in zip(lambdas, norms, strict=True)]

        def add(matrix: Tensor) -> None:
            for value, own in zip(lambdas, self.own, strict=True):
                for rows in pieces(own):  # adding mixed dtypes makes a copy
                    matrix[rows].add_(own[rows].to(matrix.device), alpha=value)
            if shrink != 1:
                diagonal = matrix.diagonal().clone()
                matrix.mul_(shrink).diagonal().copy_(diagonal)
            for pull in pulls:
                matrix.diagonal().add_(pull)

        def times(vector: Tensor) -> Tensor:
            product = sum(pulls) * vector
            for value, own in zip(lambdas, self.own, strict=True):
                moved = vector.to(own.device)
                whole = torch.cat([own[rows].to(moved) @ moved for rows in pieces(own)])
                rest = own.diagonal().to(moved) * moved
                product += value * (shrink * whole + (1 - shrink) * rest).to(product)
            return product

        cholesky = factorise(
            add,
            times,
            self.width,
            dtype=dtype,
            device=solve_device(self.own[0].device),
            step=torch.finfo(self.dtype).eps,
        )
        return None if cholesky is None else Factor(cholesky, norms)


class CrossMoments(InputMoments):
    """XᵀX̃ in addition to X̃ᵀX̃ for every concept, (in, in) each, for the targets X ΔW_iᵀ."""

    def __init__(self, concepts: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(concepts, width, dtype, device)
        self.cross = [torch.zeros_like(own) for own in self.own]

    def add_cross(self, concept: int, reference: Tensor, merged: Tensor) -> None:
        """``reference`` X and ``merged`` X̃ are (tokens, in) of the same samples."""
        self.cross[concept].addmm_(reference.mT, merged)


def _block(width: int, device: torch.device) -> int:
    """Rows of one piece of a symmetric update: many enough for the matrix units."""
    return max(128 if device.type == "cpu" else 512, -(-width // 16))


Wanted = Callable[[int, LowRank], tuple[float, Tensor]]
"""``wanted(concept, candidate)``: ‖T_i‖² and, per component of the candidate, tr(T_iᵀ X̃_i ΔWᵀ)."""


def residuals_of(
    mean: LowRank, solution: LowRank, changes: SiteChanges, inputs: InputMoments, wanted: Wanted
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """‖T_i − X̃_i ΔWᵀ‖ / ‖T_i‖ for every concept, with the mean and with the solution, from rank ×
    rank products with finite, completed moments. From rows it would be ``(T - X @
    change.dense().mT).norm() / T.norm()``.

    If T_i is zero, it is relative to the other concepts' own changes there. Everything is float64,
    except products with the moments themselves, which have the moments' precision.
    """
    before: list[float] = []
    after: list[float] = []
    sizes = [mean.rank, solution.rank]
    both = concatenate(
        [mean, solution]
    )  # the expensive (in, in) products are computed once for both
    downs = both.down.split(sizes)
    grams = [up.mT @ up for up in both.up.split(sizes, dim=1)]
    for concept, own in enumerate(inputs.own):
        target, crossed = wanted(concept, both)
        scale = target
        if scale <= 0:
            scale = sum(output_energy(change, own) for change in changes.own.values())
        weighted = times(both.down, own).split(sizes)
        for rows, down, gram, cross, errors in zip(
            weighted, downs, grams, crossed.split(sizes), (before, after), strict=True
        ):
            output = float(((rows @ down.mT) * gram).sum())
            left = max(0.0, target - 2 * float(cross.sum()) + output)
            errors.append(math.sqrt(left / scale) if scale > 0 else 0.0)
    return tuple(before), tuple(after)


def output_energy(change: LowRank, own: Tensor) -> float:
    """‖X̃ ΔWᵀ‖²_F from r × r products; ``own`` is X̃ᵀX̃, (in, in)."""
    up, down = change.up.double(), change.down.double()
    return float(((times(down, own) @ down.mT) * (up.mT @ up)).sum())


def times(left: Tensor, moment: Tensor) -> Tensor:
    """left · moment, computed in the moment's dtype (no less exact) and returned in ``left``'s."""
    with full_precision(moment.device):
        return (left.to(moment) @ moment).to(left)
