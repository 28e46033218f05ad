"""Changes of lower rank: of factors, of whole matrices, and of the answers to normal equations.

Precondition: finite matrices. Everything is float64 but for two things: :func:`cut_matrix` looks
for the leading directions in the precision that it is given, since their errors count only squared
in the energy that is kept, and a matrix or metric that comes in float32 is divided in float32.
Without a metric an equivalent of each is ``torch.linalg.svd``, at ten times the time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..lora import LowRank, Rank, SiteChanges, rank_for
from .precision import full_precision

_SMALL = 256  # up to here all directions are cheaper than a search for the leading ones


def cut_factors(change: LowRank, rank: Rank, metric: Tensor | None = None) -> tuple[LowRank, float]:
    """The best change of at most ``rank``, and the share of energy that was cut off.

    A ``rank`` between 0 and 1 is the share of energy to keep, in the same norm.

    Best is in ‖(ΔW − ΔW_k) L‖_F, where ``metric`` is L, (in, in), a lower Cholesky factor of the
    inputs' second moment M = L Lᵀ, so that the outputs on those inputs change least; without it L
    is the identity (plain SVD). Works on factors: two QR and one SVD of rank × rank, float64. The
    result has the input's dtype.
    """
    up, down = change.up.double(), change.down.double()
    if metric is not None:
        down = down @ metric.double()
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    u, s, vt = torch.linalg.svd(r_up @ r_down.mT)
    keep = rank_for(s**2, rank)
    cut = _change(q_up @ u, s, vt @ q_down.mT, keep, metric, change.kernel)
    return cut.to(change.up.dtype), _lost(s**2, keep)


def cut_to(change: LowRank, rank: Rank | None) -> tuple[LowRank, float]:
    """:func:`cut_factors`, but of ``rank`` None, or one that it has, the ``change`` as it is."""
    return (change, 0.0) if rank is None or rank >= change.rank else cut_factors(change, rank)


def cut_dense(changes: SiteChanges, dense: Tensor, rank: Rank | None) -> tuple[LowRank, float]:
    """``dense``, (out, in), which is of full rank in general, at ``rank`` by SVD (None: Σ r_i of
    the ``changes`` that it was made of), and the share of energy that is lost."""
    limit = rank if isinstance(rank, int) else changes.rank
    change, lost = cut_matrix(dense, min(limit, *dense.shape), like=changes.like)
    if isinstance(rank, float):
        change, more = cut_factors(change, rank)
        lost = 1 - (1 - lost) * (1 - more)
    return change, lost


def at_rank(change: LowRank, rank: int, *, ordered: bool) -> LowRank:
    """``change`` at no more than ``rank``. ``ordered`` says that its components stand in the order
    of their output energy, as ``iteris`` leaves them: then the first ones are the best of their
    number. Else it is cut by an SVD."""
    if change.rank <= rank:
        return change
    if ordered:
        return LowRank(change.up[:, :rank], change.down[:rank], change.kernel)
    return cut_factors(change, rank)[0]


def extract(
    dense: Tensor, energy: float, kernel: tuple[int, int] | None = None
) -> tuple[LowRank, float]:
    """Float32 factors of ``dense``, (out, in), that keep the share ``energy`` of ‖ΔW‖²_F, and the
    share that was lost. An ``energy`` of 1 leaves out what is below 1e-12 of the largest singular
    value, and nothing else."""
    u, s, vt = _gram_svd(dense.double())
    keep = rank_for(s**2, energy) if energy < 1 else int((s > s[0] * 1e-12).sum())
    change = _change(u, s, vt, keep, None, kernel).to(torch.float32)
    up, down = change.up.contiguous(), change.down.contiguous()
    return LowRank(up, down, kernel), _lost(s**2, keep)


def cut_matrix(
    matrix: Tensor,
    rank: Rank,
    metric: Tensor | None = None,
    *,
    like: LowRank,
    search: torch.dtype = torch.float64,
    elsewhere: float = 0.0,
) -> tuple[LowRank, float]:
    """:func:`cut_factors` for a change that is not given by factors, as K = ΔW L Lᵀ, (out, in).

    With L from a Cholesky factorisation of M this solves ΔW M = K and cuts ΔW at once; without a
    ``metric`` K is ΔW. ``like`` gives dtype and kernel of the result; ``elsewhere`` is energy that
    K does not hold, and that counts as lost. Small matrices, and ranks of more than a third of the
    shorter side, by the eigenvectors of that side's Gram matrix (singular values below 1e-8 of the
    largest are not told apart, and do not count); others by :func:`_leading_directions` in
    ``search``.
    """
    out, width = matrix.shape
    if rank < 1 or not searches(out, width, int(rank)):
        weighted = _over(matrix, metric).double()
        total = float((weighted**2).sum())
        u, s, vt = _gram_svd(weighted)
    else:
        with full_precision(matrix.device):
            weighted = _over(matrix.to(search), metric)
            q = _leading_directions(weighted, int(rank))
            total = float(torch.linalg.vector_norm(weighted)) ** 2
        del weighted
        # Of the directions found everything is exact again.
        q = torch.linalg.qr(q.to(matrix)).Q
        u, s, vt = _gram_svd(_over(q.mT @ matrix, metric).double())
        u = q.double() @ u
    keep = rank_for(s**2, rank)
    change = _change(u, s, vt, keep, metric, like.kernel).to(like.up.dtype)
    return change, _lost(s**2, keep, total + elsewhere)


def searches(out: int, width: int, rank: int) -> bool:
    """True if :func:`cut_matrix` searches for the leading directions, or takes all."""
    shorter = min(out, width)
    return shorter > _SMALL and rank * 3 < shorter


def leading_eigenvectors(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of a positive semidefinite float64 matrix as columns, at least ``rank`` of them,
    and their eigenvalues, descending: all of a small one, else those that a search finds."""
    basis = None
    if searches(len(gram), len(gram), rank):
        basis = _leading_directions(gram, rank, symmetric=True)
        gram = basis.mT @ gram @ basis
    values, vectors = torch.linalg.eigh(gram)
    vectors = vectors.flip(1)
    return vectors if basis is None else basis @ vectors, values.flip(0).clamp(min=0)


def _leading_directions(matrix: Tensor, rank: int, *, symmetric: bool = False) -> Tensor:
    """An orthonormal basis, (out, a quarter more than ``rank``), of the column space's directions
    of most energy: a randomised range finder with power iterations from a fixed seed (Halko,
    Martinsson and Tropp 2011, algorithm 4.4), four with A Aᵀ or five with a ``symmetric`` A."""
    width = min(rank + max(10, rank // 4), *matrix.shape)
    generator = torch.Generator(device=matrix.device).manual_seed(0)
    probe = torch.randn(
        matrix.shape[1], width, dtype=matrix.dtype, device=matrix.device, generator=generator
    )
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(5 if symmetric else 4):
        basis = torch.linalg.qr(matrix @ (basis if symmetric else matrix.mT @ basis)).Q
    return basis


def _over(matrix: Tensor, metric: Tensor | None) -> Tensor:
    """K L⁻ᵀ"""
    if metric is None:
        return matrix
    return torch.linalg.solve_triangular(metric.to(matrix.dtype).mT, matrix, upper=True, left=False)


def _gram_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, s, vᵀ by an eigendecomposition of the shorter side, ten times sooner than an SVD."""
    if matrix.shape[0] > matrix.shape[1]:
        v, s, ut = _gram_svd(matrix.mT)
        return ut.mT, s, v.mT
    u = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors.flip(1)
    rows = u.mT @ matrix
    s = rows.norm(dim=1)
    return u, s, rows / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]


def _lost(energies: Tensor, keep: int, total: float | None = None) -> float:
    """The share of ``total`` (all ``energies`` together) that is not in the first ``keep``."""
    total = float(energies.sum()) if total is None else total
    return max(0.0, 1.0 - float(energies[:keep].sum()) / total) if total > 0 else 0.0


def _change(
    u: Tensor,
    s: Tensor,
    vt: Tensor,
    rank: int,
    metric: Tensor | None,
    kernel: tuple[int, int] | None,
) -> LowRank:
    """Factors of equal norm from an SVD of ΔW L, with L taken out again."""
    root = s[:rank].sqrt()
    up = u[:, :rank] * root
    down = root[:, None] * vt[:rank]
    if metric is not None:
        down = torch.linalg.solve_triangular(metric, down.to(metric), upper=False, left=False)
    # A weighted SVD leaves the two factors of unequal size; half-precision files want them alike.
    balance = math.sqrt(float(down.norm() / up.norm())) if float(up.norm()) > 0 else 1.0
    if not math.isfinite(balance) or balance == 0.0:
        balance = 1.0
    return LowRank(up * balance, down / balance, kernel)
