"""Cholesky factors of positive semidefinite matrices that are sums, in the lowest sufficient
precision.

A function adds the matrix to zeros, so no second copy exists: the factorisation is in place. Single
precision suffices if the factor solves with at least one correct digit in every direction; one
refinement step on a probe checks this. Otherwise, or if it fails, double precision is used. If the
matrix is singular even then, the smallest multiple of the identity that allows a factorisation is
added. For nonsingular matrices this equals ``torch.linalg.cholesky``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SolveError

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
