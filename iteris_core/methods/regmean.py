"""Least squares on activations: RegMean, Chain of Merges and SSR-Merge.

RegMean (Jin et al., ICLR 2023, arXiv 2212.09849) is the paper's eq. 4, ΔW = (Σ ΔW_i G_i)(Σ G_i)⁻¹
with G_i = X_iᵀX_i, its off-diagonal entries shrunk. RegMean++ (2025, arXiv 2508.03121) takes G_i
from the inputs that reach the site through already merged layers. Both are exactly low rank.

Chain of Merges (Buzzega et al., 2025, arXiv 2508.21421) fits each layer to its whole output in
every LoRA's own model, on inputs that passed through already merged layers: min Σ ‖X̃_i (W0 + ΔW)ᵀ −
X_i (W0 + ΔW_i)ᵀ‖², with equal tokens. That is the sweep of ``iteris`` without its weighting, choice
of tokens and repair.

SSR-Merge (Wei et al., ICML 2026, arXiv 2606.10617) routes signals between the LoRAs' subspaces.
With z = A x for all down matrices stacked in A, the router is R = Q G⁻¹, G = mean z zᵀ + λ I, Q's
k-th rows = mean z_k zᵀ on concept k's own tokens, and ΔW = [up_1 … up_N] R A. A LoRA that does not
change a site takes no part there; a site of a single LoRA is passed through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..activations.tokens import ConceptTokens
from ..errors import SettingsError
from ..linalg import full_precision
from ..lora import LowRank, SiteChanges
from ..passes.job import Job
from ..settings import Settings, setting
from ..solve.moments import Gram, OutputMoments
from ..solve.problem import MemoryEstimate, Reduction, RegressionSpec, SiteContext, Solution
from .registry import micro_batch_setting, on_activations, rank_setting


@dataclass(frozen=True)
class RegMeanSettings(Settings):
    shrink: float = setting(
        0.9,
        "Factor on off-diagonal entries of the moments; 0.9 in the paper, 1 is eq. 4 of IterIS.",
        low=0,
        high=1,
    )
    weighting: Literal["none", "tokens"] = setting(
        "none",
        "How to balance the concepts: not at all, as in the papers' equations, or by their number "
        "of tokens, as in the authors' code.",
    )
    rank: int | float | None = rank_setting()
    micro_batch: int = micro_batch_setting()


@on_activations("regmean", RegMeanSettings, Gram, merged_inputs=False)
def regmean(job: Job, settings: RegMeanSettings) -> RegressionSpec:
    """Least squares on each LoRA's own inputs (RegMean, ICLR 2023; paper, eq. 4)."""
    by = settings.weighting
    return RegressionSpec(job.weights, 0.0, by, shrink=settings.shrink, rank=settings.rank)


@on_activations("regmean++", RegMeanSettings, Gram, merged_inputs=True)
def regmean_plus_plus(job: Job, settings: RegMeanSettings) -> RegressionSpec:
    """RegMean on inputs that passed through already merged layers (RegMean++, 2025)."""
    return regmean(job, settings)


@dataclass(frozen=True)
class ChainOfMergesSettings(Settings):
    ridge: float = setting(
        1e-6,
        "How strongly a layer is pulled toward the LoRAs, so that layers with few tokens have a "
        "solution.",
        low=0,
        below=1,
    )
    shrink: float = setting(
        1.0,
        "Factor on off-diagonal entries of the moments, as in RegMean; 1 is plain least squares.",
        above=0,
        high=1,
    )
    rank: int | float | None = rank_setting()
    micro_batch: int = micro_batch_setting()


@on_activations("chain-of-merges", ChainOfMergesSettings, OutputMoments, merged_inputs=True)
def chain_of_merges(job: Job, settings: ChainOfMergesSettings) -> RegressionSpec:
    """Least squares on each LoRA's own outputs, layer after layer (Chain of Merges, 2025)."""
    return RegressionSpec(
        job.weights, settings.ridge, "none", shrink=settings.shrink, rank=settings.rank
    )


@dataclass(frozen=True)
class SsrSettings(Settings):
    ridge: float = setting(1e-4, "λ, absolute, as in the source.", low=0)
    micro_batch: int = micro_batch_setting()


class Router(Reduction):
    """Σ z zᵀ and, by rows, Σ z_k zᵀ, (Σ r_i, Σ r_i) both, in float32."""

    def __init__(self, context: SiteContext) -> None:
        super().__init__(context.changes)
        rank = self.changes.rank
        self._stacked = self.changes.stacked()
        self._down = self._stacked.down.to(context.device, torch.float32)
        self._gram = torch.zeros(rank, rank, device=context.device)
        self._guide = torch.zeros_like(self._gram)
        self._count = torch.zeros((), dtype=torch.float64)
        self._rows = rows_of(self.changes)

    def add(self, tokens: ConceptTokens) -> None:
        rows = self._rows.get(tokens.concept)
        if rows is None or len(self._rows) < 2:
            return
        reference = tokens.reference.float()
        with full_precision(self._gram.device):
            z = reference @ self._down.mT
            self._gram.addmm_(z.mT, z)
            self._guide[rows].addmm_(z[:, rows].mT, z)
        self._count += len(reference)

    def solve(self, fit: RegressionSpec) -> Solution:
        """``fit.ridge`` is λ, absolute, as in the source."""
        if len(self._rows) < 2:
            return Solution(self._stacked)
        count = float(self._count)
        gram, guide = (matrix.double() / count for matrix in (self._gram, self._guide))
        gram.diagonal().add_(fit.ridge)
        return routed(self._stacked, torch.linalg.solve(gram, guide.mT).mT)

    @staticmethod
    def bytes(changes: SiteChanges) -> MemoryEstimate:
        """Two float32 matrices and A; solving needs three of them in float64."""
        rank = changes.rank
        return MemoryEstimate(8 * rank * rank + 4 * rank * changes.shape[1], 24 * rank * rank)


def rows_of(changes: SiteChanges) -> dict[int, slice]:
    """Concept → its rows of the stacked down matrices."""
    rows: dict[int, slice] = {}
    start = 0
    for concept, change in changes.present.items():
        rows[concept] = slice(start, start + change.rank)
        start += change.rank
    return rows


def routed(stacked: LowRank, router: Tensor) -> Solution:
    """ΔW = [up_1 … up_N] R A for the router R, (Σ r_i, Σ r_i)."""
    up = (stacked.up.double() @ router.to(stacked.up.device)).to(stacked.up)
    return Solution(LowRank(up, stacked.down, stacked.kernel))


@on_activations("ssr", SsrSettings, Router, merged_inputs=False, sums=False)
def ssr(job: Job, settings: SsrSettings) -> RegressionSpec:
    """Least squares in the row space of all LoRAs together (SSR-Merge, ICML 2026)."""
    weighted = [one.name for one in job.concepts if one.lora is not None and one.weight != 1]
    if weighted:
        raise SettingsError(
            f"ssr cannot weigh its LoRAs, but {', '.join(weighted)} has a weight other than 1; "
            "leave the weight out, or use another method, such as iteris."
        )
    return RegressionSpec(job.weights, settings.ridge, "none")
