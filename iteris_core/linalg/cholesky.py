"""Cholesky factors of positive semidefinite matrices that are sums, in as few digits as will do.

The matrix is given by a function that adds it to zeros, so that no second copy of it is kept: the
factorisation is made in place. Single precision is enough where the factor solves with at least
one right digit in every direction, which one step of refinement on a probe tells; else, and where
it fails, double precision; and where the matrix is singular in that too, with the smallest multiple
of the identity on top that lets a factorisation through. Where nothing is singular an equivalent is
``torch.linalg.cholesky``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SolveError

_ERROR = 0.1  # of a probe's solution; more is too few digits for single precision
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
    """The factor of M, which ``add(zeros)`` adds to an (n, n) matrix; None where M is zero.

    ``times(v)`` is M v in float64 for a probe v, (n,). ``dtype`` is float32 or float64; the factor
    has it, or float64 where float32 has not digits enough. ``step`` is the first multiple of I that
    is tried, relative to the mean of M's diagonal. Raises :class:`SolveError` where M has no factor
    even so.
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
    """True if M x = v, solved with the factor for a probe v of signs, has a digit that is right.

    The probe has a part in every direction, so that its solution lies in those of the smallest
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
