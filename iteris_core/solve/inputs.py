"""Second moments of a site's inputs per concept, and the factor of M.

Sites that receive the same tensor share the moments, and with them the factor. M is added to zeros
and factorised in place, so no second copy exists. Single precision suffices if the factor solves
with at least one correct digit in every direction; one refinement step on a probe checks this.
Otherwise, or if it fails, double precision is used. If M is singular even then, the smallest
multiple of the identity that allows a factorisation is added. For a nonsingular M this equals
``torch.linalg.cholesky``. Whether a factor can be used is read from the device only after the solve
with it, so that the device never waits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SolveError
from ..linalg import frobenius, full_precision, pieces, solve_device
from ..lora import LowRank

_ERROR = 0.1  # relative change of a probe's solution; above it single precision is not enough
NOT_FINITE = "its inputs or outputs contain NaN or infinite values; try a base model in float32."


@dataclass(frozen=True)
class Factor:
    """``lower`` is L, (in, in), with L Lᵀ = M + ``jitter`` · I for M = Σ λ_i (X̃_iᵀX̃_i + ρ_i I);
    ``norms`` are ‖X̃_iᵀX̃_i‖_F, (concepts,), and ``lambdas`` λ_i. ``checks`` are on its device, see
    :meth:`InputMoments.can_use`."""

    lower: Tensor
    norms: Tensor
    lambdas: Sequence[float]
    checks: Tensor
    jitter: float = 0.0


class InputMoments:
    """X̃_iᵀX̃_i for every concept, (in, in) each; ``tokens`` counts tokens. While tokens are added,
    only the upper block triangle is valid; :meth:`complete` mirrors it."""

    def __init__(self, concepts: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (concepts, width, width)
        self.width, self.dtype = width, dtype
        self.own = list(torch.zeros(shape, dtype=dtype, device=device))
        self.tokens = torch.zeros(concepts, dtype=torch.float64)
        # Rows of one piece of a symmetric update: many enough for the matrix units.
        self._block = max(128 if device.type == "cpu" else 512, -(-width // 16))
        self._whole = True
        self._factors: dict[tuple[tuple[float, ...], float, float, torch.dtype], Factor] = {}

    def add(self, concept: int, merged: Tensor) -> None:
        """``merged`` is X̃, (tokens, in), in the moments' dtype."""
        own = self.own[concept]
        for start in range(0, self.width, self._block):
            rows = slice(start, start + self._block)
            own[rows, start:].addmm_(merged[:, rows].mT, merged[:, start:])
        self._whole = self.width <= self._block
        self.forget_factor()
        self.tokens[concept] += len(merged)

    def complete(self) -> None:
        """Mirror the upper block triangles."""
        if self._whole:
            return
        for own in self.own:
            for stop in range(self._block, self.width, self._block):
                rows = slice(stop - self._block, stop)
                own[stop:, rows] = own[rows, stop:].mT
        self._whole = True

    def forget_factor(self) -> None:
        """Drop the factor; the next site computes it again."""
        self._factors.clear()

    def factor(
        self, lambdas: Sequence[float], ridge: float, shrink: float, dtype: torch.dtype
    ) -> Factor:
        """The factor of M, cached for the next site that needs it. Off-diagonal entries of
        X̃_iᵀX̃_i are multiplied by ``shrink``. The factor has the ``dtype``, or float64 once
        :meth:`can_use` has found that not precise enough."""
        self.complete()
        key = (tuple(lambdas), ridge, shrink, dtype)
        if key not in self._factors:
            self._factors = {key: self._factorised(*key)}
        return self._factors[key]

    def can_use(self, factor: Factor, checks: Sequence[float]) -> bool | None:
        """Whether the ``checks`` of a ``factor`` show that it can be used: tr M, whether it could
        not be factorised, the digits that a probe lacks, and the norms. If not, :meth:`factor`
        gives a better one from now on. None if no input has energy. Raises :class:`SolveError` if a
        moment is not finite, or M cannot be factorised."""
        trace, failed, lacks, *norms = checks
        if not all(map(math.isfinite, norms)):
            raise SolveError(NOT_FINITE)
        if trace <= 0:
            return None
        if not math.isfinite(trace):
            raise SolveError("the normal equations are not finite; lower the concepts' weights.")
        if failed == 0 and lacks <= 0:
            return True
        first = torch.finfo(self.dtype).eps * trace / self.width
        jitter = 10 * factor.jitter + first if factor.lower.dtype == torch.float64 else 0.0
        if jitter > trace:
            raise SolveError("the normal equations cannot be factorised; raise `ridge`.")
        key = next(iter(self._factors))
        self._factors[key] = self._factorised(*key[:3], torch.float64, jitter)
        return False

    def _factorised(
        self,
        lambdas: Sequence[float],
        ridge: float,
        shrink: float,
        dtype: torch.dtype,
        jitter: float = 0.0,
    ) -> Factor:
        device = solve_device(self.own[0].device)
        norms = torch.stack([frobenius(own) for own in self.own]).to(device, torch.float64)
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

        def digits_lacking(lower: Tensor) -> Tensor:
            """≤ 0 if M x = v, solved with the factor for a probe v of signs, has a correct digit.
            The probe has a component in every direction, so its solution is dominated by the
            smallest eigenvalues, where digits are lost first."""
            generator = torch.Generator(device=lower.device).manual_seed(0)
            signs = torch.randint(0, 2, (len(lower),), generator=generator, device=lower.device)
            probe = (2 * signs - 1).double()
            solution = torch.cholesky_solve(probe.to(lower)[:, None], lower)[:, 0]
            vector = solution.double()
            product = sum(pulls) * vector  # M x in float64
            for value, own in zip(lambdas, self.own, strict=True):
                moved = vector.to(own.device)
                whole = torch.cat([own[rows].to(moved) @ moved for rows in pieces(own)])
                rest = own.diagonal().to(moved) * moved
                product += value * (shrink * whole + (1 - shrink) * rest).to(product)
            left = (probe - product).to(lower)
            correction = torch.cholesky_solve(left[:, None], lower)[:, 0]
            return correction.norm().double() - _ERROR * solution.norm().double()

        matrix = torch.zeros(self.width, self.width, dtype=dtype, device=device)
        add(matrix)
        trace = matrix.diagonal().sum().double()
        matrix.diagonal().add_(jitter)
        # In place: LAPACK's order of entries is that of the transpose, and M is symmetric.
        info = torch.zeros((), dtype=torch.int32, device=device)
        lower, _ = torch.linalg.cholesky_ex(matrix.mT, out=(matrix.mT, info))
        lacks = torch.zeros_like(trace) if dtype == torch.float64 else digits_lacking(lower)
        checks = torch.stack([trace, info.double(), lacks, *norms])
        return Factor(lower, norms, lambdas, checks, jitter)


class CrossMoments(InputMoments):
    """XᵀX̃ in addition to X̃ᵀX̃ for every concept, (in, in) each, for the targets X ΔW_iᵀ."""

    def __init__(self, concepts: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(concepts, width, dtype, device)
        self.cross = [torch.zeros_like(own) for own in self.own]


def output_energy(change: LowRank, own: Tensor) -> Tensor:
    """‖X̃ ΔWᵀ‖²_F, a scalar, from r × r products; ``own`` is X̃ᵀX̃, (in, in)."""
    change = change.to(torch.float64, solve_device(own.device))
    up, down = change.up, change.down
    return ((times(down, own) @ down.mT) * (up.mT @ up)).sum()


def times(left: Tensor, moment: Tensor) -> Tensor:
    """left · moment, computed in the moment's dtype (no less exact) and returned in ``left``'s."""
    with full_precision(moment.device):
        return (left.to(moment) @ moment).to(left)
