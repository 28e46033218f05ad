"""The Cholesky factor of M = Σ λ_i (X̃_iᵀX̃_i + ρ_i I), ρ_i = α ‖X̃_iᵀX̃_i‖_F, of one site or many.

With ``shrink`` off-diagonal entries of X̃_iᵀX̃_i are multiplied by it. Everything is float64. Sites
of equal width are factorised in one batch, which is what keeps a GPU busy when a Jacobi iteration
has the moments of all sites at hand. A matrix that is not positive definite (``ridge=0`` and too
few tokens) gets the smallest multiple of I that lets a factorisation through; the right-hand side
answers with a pull toward the mean change, see :mod:`.solve`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import SolveError
from .moments import Factor, InputMoments, SharedInputs, pieces

_BATCH = 1 << 24  # entries of M factorised at once: 128 MiB
_WIDE = 4097  # from here on one at a time, in place
_BLOCK = 1024


def input_norms(inputs: SharedInputs) -> tuple[float, ...]:
    """‖X̃_iᵀX̃_i‖_F of every concept. Raises :class:`SolveError` where one is not finite."""
    norms = tuple(_norm(part) for part in inputs.concepts)
    if not all(map(math.isfinite, norms)):
        raise SolveError(
            "its inputs or outputs hold NaN or infinite values; try a float32 base model."
        )
    return norms


def factorise(
    problems: Sequence[tuple[SharedInputs, Sequence[float]]], ridge: float, shrink: float = 1.0
) -> list[Factor]:
    """The factor of every problem (inputs, λ), kept in ``inputs.factor`` for the next that asks.

    Raises :class:`SolveError` when a moment is not finite or M cannot be factorised.
    """
    groups: dict[tuple[int, torch.device], list[tuple[SharedInputs, Sequence[float]]]] = {}
    waiting: set[int] = set()
    for inputs, lambdas in problems:
        stale = inputs.factor is None or inputs.factor.key != (ridge, shrink, *lambdas)
        if stale and id(inputs) not in waiting:
            waiting.add(id(inputs))
            own = inputs.concepts[0].own
            groups.setdefault((own.shape[0], own.device), []).append((inputs, lambdas))
    for (width, _), group in groups.items():
        size = max(1, _BATCH // width**2)
        for start in range(0, len(group), size):
            _factorise_batch(group[start : start + size], ridge, shrink)
    found: list[Factor] = []
    for inputs, lambdas in problems:
        if inputs.factor is None or inputs.factor.key != (ridge, shrink, *lambdas):
            _factorise_batch([(inputs, lambdas)], ridge, shrink)
        assert inputs.factor is not None
        found.append(inputs.factor)
    return found


def _factorise_batch(
    problems: Sequence[tuple[SharedInputs, Sequence[float]]], ridge: float, shrink: float
) -> None:
    first = problems[0][0].concepts[0].own
    work = torch.device("cpu") if first.device.type == "mps" else first.device
    shape = (len(problems), *first.shape)
    moments = torch.zeros(shape, dtype=torch.float64, device=work)
    norms: list[tuple[float, ...]] = []
    for moment, (inputs, lambdas) in zip(moments, problems, strict=True):
        norms.append(input_norms(inputs))
        for value, part in zip(lambdas, inputs.concepts, strict=True):
            for rows in pieces(part.own):  # mixed dtypes are added by way of a copy
                moment[rows].add_(part.own[rows].to(work), alpha=value)
        if shrink != 1:
            diagonal = moment.diagonal().clone()
            moment.mul_(shrink).diagonal().copy_(diagonal)
        for value, norm in zip(lambdas, norms[-1], strict=True):
            moment.diagonal().add_(value * ridge * norm)
    traces: list[float] = moments.diagonal(dim1=-2, dim2=-1).sum(-1).tolist()
    if first.shape[0] >= _WIDE and traces[0] > 0 and _cholesky_in_place(moments[0]):
        inputs, lambdas = problems[0]
        inputs.factor = Factor((ridge, shrink, *lambdas), moments[0], 0.0, norms[0])
        return
    factors, infos = torch.linalg.cholesky_ex(moments)
    for index, (inputs, lambdas) in enumerate(problems):
        key = (ridge, shrink, *lambdas)
        chol: Tensor | None = factors[index]
        jitter = 0.0
        if traces[index] <= 0:
            chol = None
        elif int(infos[index]) != 0:
            step = torch.finfo(first.dtype).eps * traces[index] / first.shape[0]
            chol, jitter = _with_jitter(moments[index], traces[index], step)
        inputs.factor = Factor(key, chol, jitter, norms[index])


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


def _cholesky_in_place(moment: Tensor) -> bool:
    """Replace a wide matrix by its lower factor, block column by block column; False, and the
    matrix as it was, where it is not positive definite."""
    width, diagonal = len(moment), moment.diagonal().clone()
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        own = slice(start, stop)
        chol, info = torch.linalg.cholesky_ex(moment[own, own])
        if int(info) != 0:
            # Upper blocks are untouched yet: they and the diagonal hold the matrix.
            moment.copy_(moment.triu(1) + moment.triu(1).mT)
            moment.diagonal().copy_(diagonal)
            return False
        moment[own, own] = moment[own, own].triu(1) + chol
        if stop < width:
            panel = moment[stop:, own]
            panel.copy_(torch.linalg.solve_triangular(chol.mT, panel, upper=True, left=False))
            for at in range(0, width - stop, _BLOCK):
                cut = slice(at, at + _BLOCK)
                block = moment[stop + at :, stop:][:, cut]
                rows = panel[at:]
                lower = rows @ panel[cut].mT
                top = min(_BLOCK, block.shape[1])
                block[:top].sub_(lower[:top].tril())
                block[top:].sub_(lower[top:])
    moment.tril_()
    return True


def _norm(part: InputMoments) -> float:
    dtype = torch.float32 if part.own.device.type == "mps" else torch.float64
    norms = [torch.linalg.vector_norm(part.own[rows], dtype=dtype) for rows in pieces(part.own)]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
