"""KnOTS (Stoica et al., ICLR 2025, arXiv 2410.19735): merge in a basis that the LoRAs share.

[ΔW_1 … ΔW_N] = U S [V_1 … V_N]; the S V_i are merged with TIES, trimmed over all sites together as
in the authors' code, and ΔW = U (S V). The SVD of the wide matrix is one QR of the stacked up
factors and one small SVD; the result has rank Σ r_i exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import cut_to
from ..lora import LowRank
from ..settings import Settings, setting
from .elected_signs import disjoint_mean
from .registry import AtSite, on_weights, rank_setting


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
