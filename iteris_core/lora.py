"""Low-rank changes of a base model's weights, and what can be done to them without the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bases import Base
from .errors import IterisError, SettingsError


@dataclass(frozen=True)
class LowRank:
    """One change of one site: ``ΔW = up @ down``, with any scale folded in.

    ``up`` is (out, rank). ``down`` is (rank, in); for a Conv2d it is (rank, in·kh·kw) in the order
    of ``weight.flatten(1)``, and ``kernel`` holds (kh, kw).
    """

    up: Tensor
    down: Tensor
    kernel: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise IterisError(
                f"up {tuple(self.up.shape)} and down {tuple(self.down.shape)} do not form a "
                "product; pass up as (out, rank) and down as (rank, in)."
            )

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return self.up.shape[0], self.down.shape[1]

    def dense(self) -> Tensor:
        """ΔW, (out, in), in the factors' dtype."""
        return self.up @ self.down

    def scaled(self, factor: float) -> LowRank:
        return LowRank(self.up * factor, self.down, self.kernel)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LowRank:
        return LowRank(
            self.up.to(device=device, dtype=dtype),
            self.down.to(device=device, dtype=dtype),
            self.kernel,
        )

    def squared_norm(self) -> float:
        """‖ΔW‖²_F, from two rank × rank products in float64."""
        up, down = self.up.double(), self.down.double()
        return float(((up.mT @ up) * (down @ down.mT)).sum())


@dataclass(frozen=True)
class Lora:
    """Changes by site name, such as ``unet.mid_block.attentions.0…to_q`` or
    ``text_encoder.text_model.encoder.layers.0.self_attn.q_proj``; ``name`` is for messages.

    ``source`` and ``sha256`` are of the file. ``base`` is what it was read for, if that is known.
    ``scales`` are the factors that the reader folded into ``up`` (not there: 1), so that the file
    can be written again bit by bit. ``notes`` say what reading did beyond taking the file as it is.
    ``embeddings`` are (vectors, width) by name and text encoder (``clip_l``, ``clip_g``, …).
    ``reading`` are the choices that the file was read with, to read it so again.
    """

    sites: Mapping[str, LowRank]
    name: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    source: str = ""
    sha256: str = ""
    base: Base | None = None
    scales: Mapping[str, float] = field(default_factory=dict[str, float])
    notes: Sequence[str] = ()
    embeddings: Mapping[str, Mapping[str, Tensor]] = field(
        default_factory=dict[str, Mapping[str, Tensor]]
    )
    reading: Mapping[str, object] = field(default_factory=dict[str, object])

    @property
    def ranks(self) -> set[int]:
        return {change.rank for change in self.sites.values()}


def at_rank(change: LowRank, rank: int, *, ordered: bool) -> LowRank:
    """``change`` at no more than ``rank``. ``ordered`` says that its components stand in the order
    of their output energy, as ``iteris`` leaves them: then the first ones are the best of their
    number. Else it is cut by an SVD."""
    if change.rank <= rank:
        return change
    if ordered:
        return LowRank(change.up[:, :rank], change.down[:rank], change.kernel)
    return truncate(change, rank)[0]


def concatenate(changes: Sequence[LowRank]) -> LowRank:
    """The exact sum of ``changes``, of rank Σ r_i: factors side by side."""
    if not changes:
        raise IterisError("There is nothing to add up: pass at least one change.")
    first = changes[0]
    if any(change.shape != first.shape or change.kernel != first.kernel for change in changes):
        shapes = [change.shape for change in changes]
        raise IterisError(f"Changes of one site differ in shape: {shapes}. Same base model?")
    up = torch.cat([change.up for change in changes], dim=1)
    down = torch.cat([change.down for change in changes], dim=0)
    return LowRank(up, down, first.kernel)


Rank = int | float
"""A number of at least 1, or the share of energy to keep, between 0 and 1."""


def check_rank(rank: Rank | None) -> None:
    """Raise :class:`SettingsError` unless ``rank`` is a :data:`Rank` or None (keep all)."""
    if rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1):
        return
    if isinstance(rank, float) and 0 < rank < 1:
        return
    raise SettingsError(
        f"rank must be at least 1, not {rank}; or a share of energy between 0 and 1, such as 0.99."
    )


def rank_for(squares: Tensor, rank: Rank) -> int:
    """How many of the descending ``squares`` (energies) to keep."""
    if isinstance(rank, int):
        return min(rank, squares.numel())
    total = float(squares.sum())
    if total == 0:
        return 1
    kept = squares.cumsum(0) / total
    return min(int((kept < rank - 1e-12).sum()) + 1, squares.numel())


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


def factorize(
    weighted: Tensor, rank: Rank, metric: Tensor | None = None, *, like: LowRank
) -> tuple[LowRank, float]:
    """:func:`truncate` for a dense change: ``weighted`` is ΔW L, (out, in), float64.

    ``like`` gives dtype and kernel of the result. Up to 512 on the short side by the eigenvectors
    of that side's Gram matrix (singular values below 1e-8 of the largest are not told apart, and
    do not count); beyond, a randomised range finder with four power iterations (Halko, Martinsson
    and Tropp 2011, algorithms 4.4 and 5.1) from a fixed seed.
    """
    check_rank(rank)
    total = float((weighted**2).sum())
    if min(weighted.shape) <= 512 or rank < 1 or rank * 3 >= min(weighted.shape):
        u, s, vt = _gram_svd(weighted)
    else:
        u, s, vt = _randomized_svd(weighted, int(rank))
    keep = rank_for(s**2, rank)
    kept = float((s[:keep] ** 2).sum())
    share = max(0.0, 1.0 - kept / total) if total > 0 else 0.0
    return _from_svd(u, s, vt, keep, metric, like), share


def _gram_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, s, vᵀ by an eigendecomposition of the shorter side, ten times sooner than an SVD."""
    if matrix.shape[0] > matrix.shape[1]:
        v, s, ut = _gram_svd(matrix.mT)
        return ut.mT, s, v.mT
    u = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors.flip(1)
    rows = u.mT @ matrix
    s = rows.norm(dim=1)
    return u, s, rows / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]


def _randomized_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device=matrix.device).manual_seed(0)
    width = min(rank + max(10, rank // 4), min(matrix.shape))
    probe = torch.randn(
        matrix.shape[1], width, dtype=matrix.dtype, device=matrix.device, generator=generator
    )
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(4):
        basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vt = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ u, s, vt


def _from_svd(
    u: Tensor, s: Tensor, vt: Tensor, rank: int, metric: Tensor | None, like: LowRank
) -> LowRank:
    """Factors of equal norm from an SVD of ΔW L, with L taken out again."""
    rank = min(rank, s.numel())
    root = s[:rank].sqrt()
    up = u[:, :rank] * root
    down = root[:, None] * vt[:rank]
    if metric is not None:
        down = torch.linalg.solve_triangular(metric.double(), down, upper=False, left=False)
    # A weighted SVD leaves the two factors of unequal size; half-precision files want them alike.
    balance = math.sqrt(float(down.norm() / up.norm())) if float(up.norm()) > 0 else 1.0
    if not math.isfinite(balance) or balance == 0.0:
        balance = 1.0
    dtype = like.up.dtype
    return LowRank((up * balance).to(dtype), (down / balance).to(dtype), like.kernel)
