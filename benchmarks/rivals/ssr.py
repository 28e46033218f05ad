"""SSR-Merge (Wei et al., ICML 2026, arXiv 2606.10617): least squares in the LoRAs' row space.

It routes signals between the LoRAs' subspaces.
With z = A x for all down matrices stacked in A, the router is R = Q G⁻¹, G = mean z zᵀ + λ I, Q's
k-th rows = mean z_k zᵀ on concept k's own tokens, and ΔW = [up_1 … up_N] R A. A LoRA that does not
change a site takes no part there; a site of a single LoRA is passed through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iteris_core.activations.tokens import Observation
from iteris_core.errors import SettingsError
from iteris_core.linalg import full_precision
from iteris_core.lora import LowRank, SiteChanges
from iteris_core.methods.registry import micro_batch_setting, on_activations
from iteris_core.passes.job import Job
from iteris_core.settings import Settings, setting
from iteris_core.solve.problem import (
    MemoryEstimate,
    Reduction,
    RegressionSpec,
    SiteContext,
    Solution,
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
        self._rows = _rows_of(self.changes)

    def add(self, tokens: Observation) -> None:
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
        return _routed(self._stacked, torch.linalg.solve(gram, guide.mT).mT)

    @staticmethod
    def bytes(changes: SiteChanges) -> MemoryEstimate:
        """Two float32 matrices and A; solving needs three of them in float64."""
        rank = changes.rank
        return MemoryEstimate(8 * rank * rank + 4 * rank * changes.shape[1], 24 * rank * rank)


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


def _rows_of(changes: SiteChanges) -> dict[int, slice]:
    """Concept → its rows of the stacked down matrices."""
    rows: dict[int, slice] = {}
    start = 0
    for concept, change in changes.present.items():
        rows[concept] = slice(start, start + change.rank)
        start += change.rank
    return rows


def _routed(stacked: LowRank, router: Tensor) -> Solution:
    """ΔW = [up_1 … up_N] R A for the router R, (Σ r_i, Σ r_i)."""
    up = (stacked.up.double() @ router.to(stacked.up.device)).to(stacked.up)
    return Solution(LowRank(up, stacked.down, stacked.kernel))
