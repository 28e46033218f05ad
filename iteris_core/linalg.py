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
from dataclasses import dataclass, replace
from typing import Any

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


def read(values: Iterable[Tensor]) -> list[Any]:
    """Tensors of one shape as numbers, in one copy from their device."""
    several = list(values)
    if not several:
        return []
    return torch.stack([value.to(several[-1].device) for value in several]).tolist()


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
    is the identity (plain SVD). Works on factors: two QR and one SVD of rank × rank, float64. The
    result has the input's dtype."""
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
    cut = _change(u, s, vt, keep, None, None).to(torch.float32)
    return LowRank(cut.up.contiguous(), cut.down.contiguous())


@dataclass(frozen=True)
class Sketch:
    """A change before its cut, float64: ``left`` V Vᵀ ``right``, (out, k) and (k, in), with the
    leading eigenvectors V of ``gram``, (k, k), whose eigenvalues are the components' energies; if
    it is empty, nothing is cut, and V is the identity. ``total`` is the energy of the whole change.
    ``tall``: ``left`` has the components' sizes, otherwise ``right``."""

    left: Tensor
    right: Tensor
    gram: Tensor
    total: Tensor
    tall: bool = False

    def on_host(self, *numbers: Tensor) -> tuple[Sketch, list[list[float]]]:
        """The same on the CPU, and ``numbers`` beside it, in one copy: the only time that a site's
        solve waits for the device."""
        if self.left.device.type == "cpu":
            return self, [one.tolist() for one in numbers]
        parts = [self.left, self.right, self.gram, self.total, *numbers]
        flat = torch.cat([part.to(self.left).flatten() for part in parts]).cpu()
        copies = flat.split([part.numel() for part in parts])
        pairs = zip(copies, parts, strict=True)
        left, right, gram, total, *read = (copy.view(part.shape) for copy, part in pairs)
        return Sketch(left, right, gram, total, self.tall), [one.tolist() for one in read]

    def cut(self, rank: Rank, most: int | None = None) -> tuple[LowRank, float]:
        """The change at ``rank``, or with this share of the energy of its first ``most``
        components; and the share of the total energy lost."""
        if not self.gram.numel():
            return LowRank(self.left, self.right), 0.0
        values, vectors = torch.linalg.eigh(self.gram)
        energies = values.flip(0)[:most].clamp(min=0)
        keep = rank_for(energies, rank)
        vectors, rounding = vectors.flip(1)[:, :keep], max(1e-16 * float(energies[0]), 1e-300)
        size = energies[:keep].clamp(min=rounding) ** (-0.25 if self.tall else 0.25)
        up, down = self.left @ vectors * size, (vectors.mT @ self.right) / size[:, None]
        return _balanced(up, down), _lost(energies, keep, float(self.total))


def truncate_matrix(
    matrix: Tensor, rank: Rank, metric: Tensor | None = None, *, like: LowRank
) -> tuple[LowRank, float]:
    """:func:`truncate_factors` for a change without factors, K = ΔW L Lᵀ, (out, in). With L from a
    Cholesky factorisation of M, this solves ΔW M = K and cuts ΔW in one step; without a ``metric``,
    K is ΔW. ``like`` gives dtype and kernel."""
    change, lost = sketch(matrix, rank, metric).on_host()[0].cut(rank)
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
    if rank < 1 or not searches(out, width, int(rank)):
        weighted = _over(matrix, metric)
        total = (weighted.double() ** 2).sum() + elsewhere
        if out > width:
            left = weighted.double()
            right = torch.eye(width, dtype=matrix.dtype, device=matrix.device)
            right = _over(right, metric, upper=False).double()
            return Sketch(left, right, left.mT @ left, total, tall=True)
        left = torch.eye(out, dtype=torch.float64, device=matrix.device)
        return _wide(left, weighted, metric, total)
    with full_precision(matrix.device):
        weighted = _over(matrix.to(search), metric)
        q = _leading_directions(weighted, int(rank))
        total = torch.linalg.vector_norm(weighted).double() ** 2 + elsewhere
    del weighted
    # From here on, everything is exact for the directions found.
    q = torch.linalg.qr(q.to(matrix)).Q
    return _wide(q.double(), _over(q.mT @ matrix, metric), metric, total)


def _wide(left: Tensor, weighted: Tensor, metric: Tensor | None, total: Tensor) -> Sketch:
    """The sketch of ``left`` B L⁻¹, where B is ``weighted``."""
    right, weighted = _over(weighted, metric, upper=False).double(), weighted.double()
    return Sketch(left, right, weighted @ weighted.mT, total)


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
    """Factors of equal norm from an SVD of ΔW L, with L divided out."""
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vt[:rank]
    if metric is not None:
        down = torch.linalg.solve_triangular(metric, down.to(metric), upper=False, left=False)
    return _balanced(up, down, kernel)


def _balanced(up: Tensor, down: Tensor, kernel: tuple[int, int] | None = None) -> LowRank:
    """``up @ down`` with factors of equal norm: a weighted SVD leaves factors of unequal size, and
    half-precision files need similar sizes."""
    balance = math.sqrt(float(down.norm() / up.norm())) if float(up.norm()) > 0 else 1.0
    if not math.isfinite(balance) or balance == 0.0:
        balance = 1.0
    return LowRank(up * balance, down / balance, kernel)


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
