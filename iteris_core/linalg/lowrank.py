"""Changes of lower rank: of factors, of dense matrices, and of the answers to normal equations.

Precondition: finite matrices. All of it is float64 but for the search of :func:`factorize` for the
leading directions, whose errors count only squared in the energy that is kept, and for solves with
a matrix or metric that comes in float32. Without a metric and for one matrix an equivalent is
``torch.linalg.svd``, at ten times the time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..lora import LowRank, Rank, check_rank, rank_for
from .precision import full_precision

_SMALL = 256  # up to here all directions are cheaper than a search for the leading ones


def extract(
    dense: Tensor, energy: float, kernel: tuple[int, int] | None = None
) -> tuple[LowRank, float]:
    """Float32 factors that keep the share ``energy`` of ‖ΔW‖²_F, and the share that was lost.

    ``dense`` is (out, in). By the eigenvectors of the Gram matrix of its shorter side, float64:
    the projection onto the leading ones is the best of its rank (Eckart and Young 1936).
    """
    wide = dense.shape[0] <= dense.shape[1]
    matrix = (dense if wide else dense.mT).double()
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    squares = values.flip(0).clamp(min=0)
    keep = rank_for(squares, energy)
    if energy == 1:
        keep = int((squares > squares[0] * 1e-24).sum())
    basis = vectors.flip(1)[:, :keep]
    other = basis.mT @ matrix
    total = float(squares.sum())
    lost = float(squares[keep:].sum()) / total if total > 0 else 0.0
    up, down = (basis, other) if wide else (other.mT, basis.mT)
    return LowRank(up.float().contiguous(), down.float().contiguous(), kernel), lost


def truncate(change: LowRank, rank: Rank, metric: Tensor | None = None) -> tuple[LowRank, float]:
    """The best change of at most ``rank``, and the share of energy that was cut off.

    A ``rank`` between 0 and 1 is the share of energy to keep, in the same norm.

    Best is in ‖(ΔW − ΔW_k) L‖_F, where ``metric`` is L, (in, in), a lower Cholesky factor of the
    inputs' second moment M = L Lᵀ, so that the outputs on those inputs change least; without it L
    is the identity (plain SVD). Works on factors: two QR and one SVD of rank × rank, float64. The
    result has the input's dtype.
    """
    check_rank(rank)
    up, down = change.up.double(), change.down.double()
    if metric is not None:
        down = down @ metric.double()
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    u, s, vt = torch.linalg.svd(r_up @ r_down.mT)
    total = float((s**2).sum())
    keep = rank_for(s**2, rank)
    lost = float((s[keep:] ** 2).sum()) / total if total > 0 else 0.0
    return _from_svd(q_up @ u, s, vt @ q_down.mT, keep, metric, change), lost


def at_rank(change: LowRank, rank: int, *, ordered: bool) -> LowRank:
    """``change`` at no more than ``rank``. ``ordered`` says that its components stand in the order
    of their output energy, as ``iteris`` leaves them: then the first ones are the best of their
    number. Else it is cut by an SVD."""
    if change.rank <= rank:
        return change
    if ordered:
        return LowRank(change.up[:, :rank], change.down[:rank], change.kernel)
    return truncate(change, rank)[0]


def factorize(
    matrix: Tensor,
    rank: Rank,
    metric: Tensor | None = None,
    *,
    like: LowRank,
    search: torch.dtype = torch.float64,
    elsewhere: float = 0.0,
) -> tuple[LowRank, float]:
    """:func:`truncate` for a change that is not given by factors, as K = ΔW L Lᵀ, (out, in).

    With L from a Cholesky factorisation of M this solves ΔW M = K and truncates ΔW at once; without
    a ``metric`` K is ΔW. ``like`` gives dtype and kernel of the result; ``elsewhere`` is energy
    that K does not hold, and that counts as lost. Small matrices, and ranks of more than a third of
    the shorter side, by the eigenvectors of that side's Gram matrix (singular values below 1e-8 of
    the largest are not told apart, and do not count); others by a randomised range finder with four
    power iterations (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1) in ``search``, from
    a fixed seed.
    """
    check_rank(rank)
    out, width = matrix.shape
    if rank < 1 or not searches(out, width, int(rank)):
        weighted = _over(matrix, metric).double()
        total = float((weighted**2).sum())
        u, s, vt = _gram_svd(weighted)
    else:
        with full_precision(matrix.device):
            q, total = _leading(matrix.to(search), int(rank), metric)
        # Of the directions found everything is exact again.
        q = torch.linalg.qr(q.to(matrix)).Q
        u, s, vt = _gram_svd(_over(q.mT @ matrix, metric).double())
        u = q.double() @ u
    keep = rank_for(s**2, rank)
    kept = float((s[:keep] ** 2).sum())
    total += elsewhere
    share = max(0.0, 1.0 - kept / total) if total > 0 else 0.0
    return _from_svd(u, s, vt, keep, metric, like), share


def searches(out: int, width: int, rank: int) -> bool:
    """Whether :func:`factorize` searches for the leading directions, or takes all."""
    shorter = min(out, width)
    return shorter > _SMALL and rank * 3 < shorter


def leading_eigenvectors(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of a positive semidefinite float64 matrix as columns, at least ``rank`` of them,
    and their eigenvalues, descending: all of a small one, else by subspace iteration."""
    size = len(gram)
    if not searches(size, size, rank):
        values, vectors = torch.linalg.eigh(gram)
        return vectors.flip(1), values.flip(0).clamp(min=0)
    basis = torch.linalg.qr(gram @ _probe(gram, rank, size)).Q
    for _ in range(5):
        basis = torch.linalg.qr(gram @ basis).Q
    values, vectors = torch.linalg.eigh(basis.mT @ gram @ basis)
    return basis @ vectors.flip(1), values.flip(0).clamp(min=0)


def _probe(matrix: Tensor, rank: int, most: int) -> Tensor:
    generator = torch.Generator(device=matrix.device).manual_seed(0)
    width = min(rank + max(10, rank // 4), most)
    shape = (matrix.shape[1], width)
    return torch.randn(shape, dtype=matrix.dtype, device=matrix.device, generator=generator)


def _over(matrix: Tensor, metric: Tensor | None) -> Tensor:
    """K L⁻ᵀ"""
    if metric is None:
        return matrix
    return torch.linalg.solve_triangular(metric.to(matrix.dtype).mT, matrix, upper=True, left=False)


def _leading(matrix: Tensor, rank: int, metric: Tensor | None) -> tuple[Tensor, float]:
    """A basis, (out, a few more than rank), of the leading left directions of K L⁻ᵀ, and its
    energy."""
    weighted = _over(matrix, metric)
    probe = _probe(matrix, rank, min(matrix.shape))
    basis = torch.linalg.qr(weighted @ probe).Q
    for _ in range(4):
        basis = torch.linalg.qr(weighted @ (weighted.mT @ basis)).Q
    return basis, float(torch.linalg.vector_norm(weighted)) ** 2


def _gram_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, s, vᵀ by an eigendecomposition of the shorter side, ten times sooner than an SVD."""
    if matrix.shape[0] > matrix.shape[1]:
        v, s, ut = _gram_svd(matrix.mT)
        return ut.mT, s, v.mT
    u = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors.flip(1)
    rows = u.mT @ matrix
    s = rows.norm(dim=1)
    return u, s, rows / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]


def _from_svd(
    u: Tensor, s: Tensor, vt: Tensor, rank: int, metric: Tensor | None, like: LowRank
) -> LowRank:
    """Factors of equal norm from an SVD of ΔW L, with L taken out again."""
    rank = min(rank, s.numel())
    root = s[:rank].sqrt()
    up = u[:, :rank] * root
    down = root[:, None] * vt[:rank]
    if metric is not None:
        down = torch.linalg.solve_triangular(metric, down.to(metric), upper=False, left=False)
    # A weighted SVD leaves the two factors of unequal size; half-precision files want them alike.
    balance = math.sqrt(float(down.norm() / up.norm())) if float(up.norm()) > 0 else 1.0
    if not math.isfinite(balance) or balance == 0.0:
        balance = 1.0
    dtype = like.up.dtype
    return LowRank((up * balance).to(dtype), (down / balance).to(dtype), like.kernel)
