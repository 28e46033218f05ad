"""TIES, DARE and KnOTS: entries that agree in sign.

TIES (Yadav et al., NeurIPS 2023, arXiv 2306.01708) trims, elects a sign per entry and averages what
has it. A LoRA is trimmed over all of its sites together, as in the authors' code: a layer that it
changes little is left to the others. DARE (Yu et al., ICML 2024, arXiv 2311.03099) drops entries at
random and rescales the rest.

KnOTS (Stoica et al., ICLR 2025, arXiv 2410.19735) merges in a basis that the LoRAs share.
[ΔW_1 … ΔW_N] = U S [V_1 … V_N]; the S V_i are merged with TIES, trimmed over all sites together as
in the authors' code, and ΔW = U (S V). The SVD of the wide matrix is one QR of the stacked up
factors and one small SVD; the result has rank Σ r_i exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import cut_dense, cut_to
from ..lora import LowRank
from ..settings import Settings, setting
from .registry import AtSite, on_weights, rank_setting


@dataclass(frozen=True)
class TiesSettings(Settings):
    density: float = setting(
        0.2, "Share of each LoRA's entries to keep; 0.2 in the paper.", above=0, high=1
    )
    scale: float = setting(1.0, "Factor on the merged change (λ).")
    rank: int | float | None = rank_setting()


@on_weights("ties", TiesSettings, trims=AtSite.dense)
def ties(at: AtSite, settings: TiesSettings) -> tuple[LowRank, float]:
    """Trim small entries, elect a sign per entry, average what agrees (NeurIPS 2023)."""
    merged = disjoint_mean(at.trimmed(at.dense()))
    return cut_dense(at.changes, settings.scale * merged, settings.rank)


def disjoint_mean(changes: Tensor) -> Tensor:
    """Mean over (concepts, …) of the entries that have the elected sign: that of their sum, or of
    the total if the sum is zero."""
    total = changes.sum(dim=0)
    elected = torch.where(total == 0, total.sum().sign(), total.sign())
    agree = (changes.sign() == elected) & (changes != 0)
    return (changes * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


@dataclass(frozen=True)
class DareSettings(Settings):
    density: float = setting(0.5, "Probability that an entry is kept.", above=0, high=1)
    scale: float = setting(1.0, "Factor on the merged change; 1 for the plain sum.")
    rank: int | float | None = rank_setting()


@on_weights("dare-linear", DareSettings)
def dare_linear(at: AtSite, settings: DareSettings) -> tuple[LowRank, float]:
    """Drop entries at random, rescale the rest, and add up (DARE, ICML 2024)."""
    dropped = _dropped(at, settings.density)
    return cut_dense(at.changes, settings.scale * dropped.sum(dim=0), settings.rank)


@on_weights("dare-ties", DareSettings)
def dare_ties(at: AtSite, settings: DareSettings) -> tuple[LowRank, float]:
    """Drop entries at random, rescale the rest, then elect signs as in TIES (DARE, ICML 2024)."""
    dropped = _dropped(at, settings.density)
    return cut_dense(at.changes, settings.scale * disjoint_mean(dropped), settings.rank)


def _dropped(at: AtSite, density: float) -> Tensor:
    """(concepts, out, in): each entry is zero, or divided by the density."""
    stacked = torch.stack(at.dense())
    keep = torch.rand(stacked.shape, generator=at.generator, dtype=torch.float64) < density
    return stacked * keep.to(stacked.device) / density


@dataclass(frozen=True)
class KnotsSettings(Settings):
    density: float = setting(
        0.3, "Share of entries kept of each LoRA in the shared basis.", above=0, high=1
    )
    scale: float = setting(1.0, "Factor on the merged change.")
    rank: int | float | None = rank_setting()


def shared_basis(changes: list[LowRank]) -> tuple[Tensor, list[Tensor]]:
    """U, (out, Σ r_i), and the S V_i, (Σ r_i, in) each, with ΔW_i = U S V_i; float64."""
    q, r = torch.linalg.qr(torch.cat([change.up.double() for change in changes], dim=1))
    columns = r.split([change.rank for change in changes], dim=1)
    downs = [change.down.double() for change in changes]
    wide = torch.cat([part @ down for part, down in zip(columns, downs, strict=True)], dim=1)
    u, s, vt = torch.linalg.svd(wide, full_matrices=False)
    return q @ u, list((s[:, None] * vt).split(changes[0].shape[1], dim=1))


@on_weights("knots", KnotsSettings, trims=lambda at: shared_basis(at.weighted())[1])
def knots(at: AtSite, settings: KnotsSettings) -> tuple[LowRank, float]:
    """TIES in the basis of a joint SVD of all changes (KnOTS, ICLR 2025)."""
    basis, parts = shared_basis(at.weighted())
    like = at.changes.like
    change = LowRank(basis, settings.scale * disjoint_mean(at.trimmed(parts)), like.kernel)
    change, lost = cut_to(change, settings.rank)
    return change.to(like.up.dtype), lost
