"""The paper's objective in the row space of all LoRAs together: kilobytes of moments a site.

With Z̃ = X̃ Aᵀ, A all down matrices stacked, the change ΔW = [up_1 … up_N] R A is fitted to the
outputs X_i ΔW_iᵀ of each LoRA on the merged model's inputs:

    R = (Σ λ_i E_i H_iᵀ Z̃_i + pull) (Σ λ_i Z̃_iᵀZ̃_i + pull)⁻¹,   H_i = X_i down_iᵀ,

E_i placing concept i's rows, and the pull, α ‖Z̃_iᵀZ̃_i‖_F, going toward the λ-mean of the LoRAs.
:mod:`.ssr` is this with X̃ = X, λ = 1 and a pull toward zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iteris_core.activations.tokens import Observation
from iteris_core.linalg import full_precision
from iteris_core.lora import LowRank, SiteChanges
from iteris_core.solve.problem import (
    MemoryEstimate,
    Reduction,
    RegressionSpec,
    SiteContext,
    Solution,
)


class Subspace(Reduction):
    """Z̃ᵀZ̃, (Σ r_i, Σ r_i), of every concept, and HᵀZ̃, (r_i, Σ r_i), of those with a change."""

    def __init__(self, context: SiteContext) -> None:
        super().__init__(context.changes)
        changes, device = context.changes, context.device
        self._stacked = changes.stacked()
        self._down = self._stacked.down.to(device, torch.float32)
        rank = changes.rank
        self._own = list(torch.zeros(len(changes), rank, rank, device=device))
        self._cross = {
            i: torch.zeros(change.rank, rank, device=device)
            for i, change in changes.present.items()
        }
        self._counts = torch.zeros(len(changes), dtype=torch.float64)

    def add(self, tokens: Observation) -> None:
        with full_precision(self._down.device):
            self._add(tokens)

    def _add(self, tokens: Observation) -> None:
        merged = tokens.merged.float() @ self._down.mT
        self._own[tokens.concept].addmm_(merged.mT, merged)
        self._counts[tokens.concept] += len(merged)
        cross = self._cross.get(tokens.concept)
        if cross is not None:
            reference = tokens.reference.float()
            down = self.changes.present[tokens.concept].down.to(reference)
            cross.addmm_((reference @ down.mT).mT, merged)

    def solve(self, fit: RegressionSpec) -> Solution:
        """Row spaces may overlap: the least-norm solution where the matrix is singular."""
        left = torch.zeros_like(self._own[0], dtype=torch.float64)
        right = torch.zeros_like(left)
        counts = self._counts.tolist()
        values = [1.0 / max(count, 1.0) for count in counts]
        if fit.weighting != "tokens":
            values = [1.0] * len(counts)
        rows, toward = rows_of(self.changes), fit.pull_of(self.changes)
        for concept, (own, value) in enumerate(zip(self._own, values, strict=True)):
            value *= fit.weights[concept]
            pull = value * fit.ridge * float(own.double().norm())
            left.add_(own.double(), alpha=value)
            left.diagonal().add_(pull)
            if concept in rows:
                part = rows[concept]
                right[part] += value * self._cross[concept].double()
                right[part, part].diagonal().add_(toward * pull)
        router = right @ torch.linalg.pinv(left, hermitian=True, rtol=1e-12)
        return routed(self._stacked, router)

    @staticmethod
    def bytes(changes: SiteChanges) -> MemoryEstimate:
        """Moments and A in float32; the solve has five matrices in float64."""
        rank = changes.rank
        kept = 4 * rank * ((len(changes) + 1) * rank + changes.shape[1])
        return MemoryEstimate(kept, 40 * rank * rank)


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
