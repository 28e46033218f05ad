"""Dense linear algebra that knows nothing of sites: precision of products, low-rank cuts, and the
smallest magnitude that is kept of all entries.

Matrices are finite. Cuts are float64, except that :func:`truncate_matrix` searches for the leading
directions in the input's precision, because their errors enter the kept energy only squared, and
that a float32 matrix or metric is divided in float32. Without a metric, each is equivalent to
``torch.linalg.svd``, which takes ten times as long.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lora import LowRank, Rank, SiteChanges, rank_for

_HIGHEST = "highest"


_LOCK = threading.Lock()
_INSIDE: list[tuple[list[tuple[Any, str]], str]] = []
"""For everyone inside :func:`full_precision`, the settings to restore."""


@contextmanager
def full_precision(device: torch.device) -> Generator[None]:
    """True float32 products: no TF32, no bfloat16 passes, no autocast. PyTorch's setting is
    process-wide: with several threads, the first to enter raises it if needed, and the last to
    leave restores it."""
    with _LOCK:
        _INSIDE.append(_INSIDE[0] if _INSIDE else _raised_precision())
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _LOCK:
            backends, value = _INSIDE.pop()
            if not _INSIDE:
                if value != _HIGHEST:
                    torch.set_float32_matmul_precision(value)
                for backend, precision in backends:
                    backend.fp32_precision = "none"  # as the settings above this one say
                    if backend.fp32_precision != precision:
                        backend.fp32_precision = precision


def _raised_precision() -> tuple[list[tuple[Any, str]], str]:
    """Raise PyTorch's precision of float32 products, and return what to restore: the changed
    settings of backends, which exist from 2.9 on, and the single value, which cannot be read while
    they disagree."""
    backends: list[Any] = [
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    ]
    before = [(b, b.fp32_precision) for b in backends if hasattr(b, "fp32_precision")]
    changed = [pair for pair in before if pair[1] not in ("none", "ieee")]
    for backend, _ in changed:
        backend.fp32_precision = "ieee"
    value = torch.get_float32_matmul_precision()
    if value == _HIGHEST:
        return changed, value
    torch.set_float32_matmul_precision(_HIGHEST)
    return before, value  # the backends' values follow the single value


def pieces(matrix: Tensor) -> list[slice]:
    """A matrix's rows in pieces of 2 MiB in float64 (more on a GPU), for piecewise conversion."""
    entries = 1 << (18 if matrix.device.type == "cpu" else 24)
    step = max(1, entries // matrix.shape[1])
    return [slice(start, start + step) for start in range(0, len(matrix), step)]


def frobenius(matrix: Tensor) -> Tensor:
    """‖matrix‖_F as a scalar, summed piecewise in float64 if the device supports it."""
    dtype = energy_dtype(matrix.device)
    norms = [torch.linalg.vector_norm(matrix[rows], dtype=dtype) for rows in pieces(matrix)]
    return torch.linalg.vector_norm(torch.stack(norms))


def energy(matrix: Tensor) -> Tensor:
    """‖matrix‖²_F as a float64 scalar (float32 if the device lacks float64), without a copy."""
    return torch.linalg.vector_norm(matrix).to(energy_dtype(matrix.device)) ** 2


def on_host(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same on the CPU, in the dtype of the first, in one copy."""
    given = list(tensors)
    if not given or all(tensor.device.type == "cpu" for tensor in given):
        return given
    flat = torch.cat([tensor.to(given[0]).flatten() for tensor in given]).cpu()
    copies = flat.split([tensor.numel() for tensor in given])
    return [copy.view(tensor.shape) for copy, tensor in zip(copies, given, strict=True)]


def energy_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def solve_device(device: torch.device) -> torch.device:
    """The device for factorisations: the CPU if the device lacks float64."""
    return torch.device("cpu") if device.type == "mps" else device


_SMALL = 256  # up to here, all directions are cheaper than a search for the leading ones


def truncate_factors(
    change: LowRank, rank: Rank, metric: Tensor | None = None
) -> tuple[LowRank, float]:
    """The best change of rank at most ``rank``, or that keeps this share of energy, and the share
    lost. It minimises ‖(ΔW − ΔW_k) L‖_F, where ``metric`` is L, (in, in), a lower Cholesky factor
    of the inputs' second moment M = L Lᵀ, so the outputs on those inputs change least; without it L
    is the identity (plain SVD). Works on factors: a QR, and eigenvectors of rank × rank, float64.
    The result has the input's dtype."""
    small, lost = cut(sketch_factors(change.up, change.down, metric), rank)
    return replace(small.to(change.up.dtype, change.up.device), kernel=change.kernel), lost


def cut_to(change: LowRank, rank: Rank | None) -> tuple[LowRank, float]:
    """Like :func:`truncate_factors`, but returns ``change`` itself if ``rank`` is None or not
    smaller."""
    return (change, 0.0) if rank is None or rank >= change.rank else truncate_factors(change, rank)


def cut_dense(changes: SiteChanges, dense: Tensor, rank: Rank | None) -> tuple[LowRank, float]:
    """``dense``, (out, in), usually of full rank, cut to ``rank`` by SVD (None: Σ r_i of the
    ``changes`` from which it was made), and the share of energy lost."""
    limit = rank if isinstance(rank, int) else changes.rank
    change, lost = truncate_matrix(dense, min(limit, *dense.shape), like=changes.like)
    if isinstance(rank, float):
        change, more = truncate_factors(change, rank)
        lost = 1 - (1 - lost) * (1 - more)
    return change, lost


def extract(dense: Tensor, energy: float) -> LowRank:
    """Float32 factors of ``dense``, (out, in), that keep the share ``energy`` of ‖ΔW‖²_F. An
    ``energy`` of 1 drops only singular values below 1e-12 of the largest."""
    u, s, vt = _gram_svd(dense.double())
    keep = rank_for(s**2, energy) if energy < 1 else int((s > s[0] * 1e-12).sum())
    root = s[:keep].sqrt()
    change = _balanced(u[:, :keep] * root, root[:, None] * vt[:keep]).to(torch.float32)
    return LowRank(change.up.contiguous(), change.down.contiguous())


class Sketch(NamedTuple):
    """A change before its cut, float64: ``left`` V Vᵀ ``right``, (out, k) and (k, in), with the
    leading eigenvectors V of ``gram``, (k, k), whose eigenvalues are the components' energies; if
    it is empty, nothing is cut, and V is the identity. ``total`` is the energy of the whole change.
    """

    left: Tensor
    right: Tensor
    gram: Tensor
    total: Tensor


def cut(sketch: Iterable[Tensor], rank: Rank, most: int | None = None) -> tuple[LowRank, float]:
    """The change of a :class:`Sketch` at ``rank``, or with this share of the energy of its first
    ``most`` components, on the CPU; and the share of the total energy lost."""
    left, right, gram, total = on_host(sketch)
    if not gram.numel():
        return LowRank(left, right), 0.0
    values, vectors = torch.linalg.eigh(gram)
    energies = values.flip(0)[:most].clamp(min=0)
    keep = rank_for(energies, rank)
    vectors, rounding = vectors.flip(1)[:, :keep], max(1e-16 * float(energies[0]), 1e-300)
    size = energies[:keep].clamp(min=rounding) ** 0.25
    kept, whole = float(energies[:keep].sum()), float(total)
    change = _balanced(left @ vectors * size, (vectors.mT @ right) / size[:, None])
    return change, max(0.0, 1.0 - kept / whole) if whole > 0 else 0.0


def truncate_matrix(
    matrix: Tensor, rank: Rank, metric: Tensor | None = None, *, like: LowRank
) -> tuple[LowRank, float]:
    """:func:`truncate_factors` for a change without factors, K = ΔW L Lᵀ, (out, in). With L from a
    Cholesky factorisation of M, this solves ΔW M = K and cuts ΔW in one step; without a ``metric``,
    K is ΔW. ``like`` gives dtype and kernel."""
    change, lost = cut(sketch(matrix, rank, metric), rank)
    return replace(change.to(like.up.dtype, matrix.device), kernel=like.kernel), lost


def sketch(
    matrix: Tensor,
    rank: Rank,
    metric: Tensor | None = None,
    *,
    search: torch.dtype = torch.float64,
    elsewhere: Tensor | float = 0.0,
) -> Sketch:
    """The sketch of a change, on its device, see :func:`truncate_matrix`; ``elsewhere`` is energy
    outside K, which counts as lost. Small matrices, and ranks above a third of the shorter side,
    use that side's whole Gram matrix, others :func:`_leading_directions` in ``search``."""
    out, width = matrix.shape
    if rank >= 1 and searches(out, width, int(rank)):
        with full_precision(matrix.device):
            weighted = _over(matrix.to(search), metric)
            q = _leading_directions(weighted, int(rank))
            total = torch.linalg.vector_norm(weighted).double() ** 2
        # From here on, everything is exact for the directions found.
        q = torch.linalg.qr(q.to(matrix)).Q
        weighted = _over(q.mT @ matrix, metric)
    else:
        weighted = _over(matrix, metric)
        total = (weighted.double() ** 2).sum()
        q = torch.eye(out, dtype=weighted.dtype, device=weighted.device)
        if out > width:
            q, weighted = torch.linalg.qr(weighted)
    right, weighted = _over(weighted, metric, upper=False).double(), weighted.double()
    return Sketch(q.double(), right, weighted @ weighted.mT, total + elsewhere)


def sketch_factors(up: Tensor, down: Tensor, metric: Tensor | None = None) -> Sketch:
    """The sketch of the change ``up @ down``, see :func:`truncate_factors`."""
    q, right = torch.linalg.qr(up.double())
    right = right @ down.double()
    weighted = right if metric is None else right @ metric.double()
    gram = weighted @ weighted.mT
    return Sketch(q, right, gram, gram.trace())


def searches(out: int, width: int, rank: int) -> bool:
    """True if :func:`truncate_matrix` searches for the leading directions instead of using all."""
    shorter = min(out, width)
    return shorter > _SMALL and rank * 3 < shorter


def leading_eigenvectors(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """At least ``rank`` eigenvectors of a positive semidefinite float64 matrix, as columns, and
    their eigenvalues, descending, on the CPU: all for a small matrix, otherwise those that a search
    finds."""
    basis = None
    if searches(len(gram), len(gram), rank):
        basis = _leading_directions(gram, rank, symmetric=True)
    small = gram if basis is None else basis.mT @ gram @ basis
    values, vectors = torch.linalg.eigh(small.cpu())
    vectors = vectors.flip(1).to(gram.device, non_blocking=gram.is_cuda)
    return vectors if basis is None else basis @ vectors, values.flip(0).clamp(min=0)


def _leading_directions(matrix: Tensor, rank: int, *, symmetric: bool = False) -> Tensor:
    """An orthonormal basis, (out, a quarter more than ``rank``), of the column space's directions
    with most energy: a randomised range finder with power iterations from a fixed seed (Halko,
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


def _over(matrix: Tensor, metric: Tensor | None, *, upper: bool = True) -> Tensor:
    """K L⁻ᵀ, or not ``upper`` K L⁻¹."""
    if metric is None:
        return matrix
    metric = metric.to(matrix.dtype)
    metric = metric.mT if upper else metric
    return torch.linalg.solve_triangular(metric, matrix, upper=upper, left=False)


def _gram_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, s, vᵀ from an eigendecomposition of the shorter side, ten times as fast as an SVD."""
    if matrix.shape[0] > matrix.shape[1]:
        v, s, ut = _gram_svd(matrix.mT)
        return ut.mT, s, v.mT
    u = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors.flip(1)
    rows = u.mT @ matrix
    s = rows.norm(dim=1)
    return u, s, rows / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]


def _balanced(up: Tensor, down: Tensor) -> LowRank:
    """``up @ down`` with factors of equal norm: a weighted SVD leaves factors of unequal size, and
    half-precision files need similar sizes."""
    balance = math.sqrt(float(down.norm() / up.norm())) if float(up.norm()) > 0 else 1.0
    if not math.isfinite(balance) or balance == 0.0:
        balance = 1.0
    return LowRank(up * balance, down / balance)


def least_kept(
    sites: Callable[[], Iterable[Mapping[int, Tensor]]], density: float
) -> dict[int, float]:
    """concept → the magnitude that the ``density`` share of its entries reaches; none at 1.
    ``sites()`` gives every site's entries of each concept, twice. Float32 bits are in the order of
    magnitudes: the first pass counts them by their upper half, the second those that share the
    answer's upper half by the lower one, as ``torch.kthvalue`` of all entries at once would."""
    places: dict[int, int] = {}
    found: dict[int, int] = defaultdict(int)
    for shift in (16, 0) if density < 1 else ():
        counts: dict[int, Tensor] = defaultdict(lambda: torch.zeros(1 << 16, dtype=torch.int64))
        for site in sites():
            for concept, entries in site.items():
                bits = entries.abs().float().flatten().view(torch.int32)
                if not shift:
                    bits = bits[bits >> 16 == found[concept]]
                counts[concept] += torch.bincount(bits >> shift & 0xFFFF, minlength=1 << 16).cpu()
        for concept, count in counts.items():
            place = places.setdefault(concept, max(1, int(density * int(count.sum()))))
            above = count.flip(0).cumsum(0)
            larger = int((above < place).sum())
            found[concept] = (found[concept] << 16) + len(count) - 1 - larger
            places[concept] = place - (int(above[larger - 1]) if larger else 0)
    bits = torch.tensor(list(found.values()), dtype=torch.int32).view(torch.float32)
    return dict(zip(found, bits.tolist(), strict=True))
