"""The Cholesky factor of M = Σ λ_i (X̃_iᵀX̃_i + ρ_i I), ρ_i = α ‖X̃_iᵀX̃_i‖_F, of one site or many.

With ``shrink`` off-diagonal entries of X̃_iᵀX̃_i are multiplied by it. It is float64, or, where that
is enough and M is positive definite in it too, in the moments' precision. Sites of equal width are
factorised in one batch, which is what keeps a GPU busy when a Jacobi iteration has the moments of
all sites at hand. A matrix that is not positive definite (``ridge=0`` and too few tokens) gets the
smallest multiple of I that lets a factorisation through; the right-hand side answers with a pull
toward the mean change, see :mod:`.solve`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import SolveError
from ..linalg.precision import pieces
from .moments import Factor, SharedInputs

NOT_FINITE = "its inputs or outputs hold NaN or infinite values; try a float32 base model."

_BATCH = 1 << 24  # entries of M factorised at once: 128 MiB


def input_norms(inputs: SharedInputs) -> tuple[float, ...]:
    """‖X̃_iᵀX̃_i‖_F of every concept. Raises :class:`SolveError` where one is not finite."""
    norms = tuple(frobenius(part.own) for part in inputs.concepts)
    if not all(map(math.isfinite, norms)):
        raise SolveError(NOT_FINITE)
    return norms


def factorise(
    problems: Sequence[tuple[SharedInputs, Sequence[float]]],
    ridge: float,
    shrink: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> list[Factor]:
    """The factor of every problem (inputs, λ), kept in ``inputs.factor`` for the next that asks.

    ``dtype`` is what it is made in where M is positive definite in it; else in float64.
    Raises :class:`SolveError` when a moment is not finite or M cannot be factorised.
    """
    groups: dict[tuple[int, torch.device], list[tuple[SharedInputs, Sequence[float]]]] = {}
    waiting: set[int] = set()
    for inputs, lambdas in problems:
        stale = inputs.factor is None or inputs.factor.key != (ridge, shrink, dtype, *lambdas)
        if stale and id(inputs) not in waiting:
            waiting.add(id(inputs))
            own = inputs.concepts[0].own
            groups.setdefault((own.shape[0], own.device), []).append((inputs, lambdas))
    for (width, _), group in groups.items():
        size = max(1, _BATCH // width**2)
        for start in range(0, len(group), size):
            _factorise_batch(group[start : start + size], ridge, shrink, dtype)
    found: list[Factor] = []
    for inputs, lambdas in problems:
        if inputs.factor is None or inputs.factor.key != (ridge, shrink, dtype, *lambdas):
            _factorise_batch([(inputs, lambdas)], ridge, shrink, dtype)
        assert inputs.factor is not None
        found.append(inputs.factor)
    return found


def _factorise_batch(
    problems: Sequence[tuple[SharedInputs, Sequence[float]]],
    ridge: float,
    shrink: float,
    dtype: torch.dtype,
) -> None:
    own = problems[0][0].concepts[0].own
    work = torch.device("cpu") if own.device.type == "mps" else own.device
    moments = torch.zeros(len(problems), *own.shape, dtype=dtype, device=work)
    norms = [input_norms(inputs) for inputs, _ in problems]
    for moment, problem, norm in zip(moments, problems, norms, strict=True):
        _add_up(moment, problem, norm, ridge, shrink)
    traces: list[float] = moments.diagonal(dim1=-2, dim2=-1).sum(-1).tolist()
    infos = torch.zeros(len(problems), dtype=torch.int32, device=work)
    # In place: LAPACK's order of entries is that of the transpose, and M is symmetric.
    factors, _ = torch.linalg.cholesky_ex(moments.mT, out=(moments.mT, infos))
    for index, (inputs, lambdas) in enumerate(problems):
        key = (ridge, shrink, dtype, *lambdas)
        chol: Tensor | None = factors[index]
        jitter = 0.0
        if traces[index] <= 0:
            chol = None
        elif int(infos[index]) != 0 and dtype != torch.float64:
            _factorise_batch([problems[index]], ridge, shrink, torch.float64)
            assert inputs.factor is not None
            inputs.factor = replace(inputs.factor, key=key)
            continue
        elif int(infos[index]) != 0:
            moment = moments[index].zero_()
            _add_up(moment, problems[index], norms[index], ridge, shrink)
            step = torch.finfo(own.dtype).eps * traces[index] / own.shape[0]
            chol, jitter = _with_jitter(moment, traces[index], step)
        inputs.factor = Factor(key, chol, jitter, norms[index])


def _add_up(
    moment: Tensor,
    problem: tuple[SharedInputs, Sequence[float]],
    norms: Sequence[float],
    ridge: float,
    shrink: float,
) -> None:
    """Add M to ``moment``, which is zero."""
    inputs, lambdas = problem
    for value, part in zip(lambdas, inputs.concepts, strict=True):
        for rows in pieces(part.own):  # mixed dtypes are added by way of a copy
            moment[rows].add_(part.own[rows].to(moment.device), alpha=value)
    if shrink != 1:
        diagonal = moment.diagonal().clone()
        moment.mul_(shrink).diagonal().copy_(diagonal)
    for value, norm in zip(lambdas, norms, strict=True):
        moment.diagonal().add_(value * ridge * norm)


def _with_jitter(moment: Tensor, trace: float, step: float) -> tuple[Tensor, float]:
    jitter = 0.0
    while True:
        moment.diagonal().add_(step)
        jitter += step
        step *= 10
        if jitter > trace:
            raise SolveError("the normal equations cannot be factorised; raise `ridge`.")
        chol, info = torch.linalg.cholesky_ex(moment)
        if int(info) == 0:
            return chol, jitter


def frobenius(moment: Tensor) -> float:
    """‖moment‖_F, summed up in float64 where there is that."""
    dtype = torch.float32 if moment.device.type == "mps" else torch.float64
    norms = [torch.linalg.vector_norm(moment[rows], dtype=dtype) for rows in pieces(moment)]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
