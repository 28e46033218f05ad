"""SSR-Merge (Wei et al., ICML 2026, arXiv 2606.10617): route signals between the LoRAs' subspaces.

With z = A x for all down matrices stacked in A, the router is R = Q G⁻¹, G = mean z zᵀ + λ I,
Q's k-th rows = mean z_k zᵀ on concept k's own tokens, and ΔW = [up_1 … up_N] R A. A LoRA that does
not change a site takes no part there; a site of one LoRA is passed through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations.tokens import Visit
from ..lora import LowRank, concatenate
from ..passes.batches import Batching
from ..passes.job import Job
from ..passes.loops import reference_pass
from ..report.report import SiteReport
from ..settings import Settings, setting
from .iteris import check_complete
from .registry import ROWS_PER_FORWARD, Merged, method


@dataclass(frozen=True)
class SsrSettings(Settings):
    ridge: float = setting(1e-4, "λ, absolute as in the source.", low=0)
    micro_batch: int = setting(32, ROWS_PER_FORWARD, low=1)


@method("ssr", SsrSettings, needs_host=True)
def ssr(job: Job, settings: SsrSettings) -> Merged:
    """Least squares in the row space of all LoRAs together (SSR-Merge, ICML 2026)."""
    router = _Router(job)
    reference_pass(job, router, Batching(settings.micro_batch))
    merged: dict[str, tuple[LowRank, SiteReport]] = {}
    for site, stacked in router.stacked.items():
        if site in router.grams:
            route = router.solve(site, settings.ridge)
            up = (stacked.up.double() @ route).to(stacked.up)
            stacked = LowRank(up, stacked.down, stacked.kernel)
            merged[site] = stacked, SiteReport(stacked.rank)
        elif site in router.seen:
            merged[site] = stacked, SiteReport(stacked.rank)
    check_complete(job, merged)
    return merged


class _Router:
    """A visitor that sums z zᵀ and z_k zᵀ of every site with more than one LoRA."""

    def __init__(self, job: Job) -> None:
        self.stacked: dict[str, LowRank] = {}
        self.grams: dict[str, tuple[Tensor, Tensor]] = {}
        self.seen: set[str] = set()
        self._shards = job.shards
        self._tokens: dict[str, Tensor] = {}
        self._slices: dict[str, dict[int, slice]] = {}
        for site, changes in job.references.items():
            present = [(k, change) for k, change in enumerate(changes) if change is not None]
            self.stacked[site] = concatenate([change for _, change in present])
            slices: dict[int, slice] = {}
            start = 0
            for concept, change in present:
                slices[concept] = slice(start, start + change.rank)
                start += change.rank
            self._slices[site] = slices

    def visit(self, visit: Visit) -> None:
        site = visit.site
        slices = self._slices[site]
        self.seen.add(site)
        if len(slices) < 2:
            return
        down = self.stacked[site].down.to(visit.inputs.device, torch.float32)
        if site not in self.grams:
            zeros = torch.zeros(len(down), len(down), device=down.device)
            self.grams[site] = zeros, zeros.clone()
            self._tokens[site] = torch.zeros((), dtype=torch.float64, device=down.device)
        gram, guide = self.grams[site]
        for concept, start, stop in visit.spans:
            if concept in slices:
                x = visit.input_tokens(start, stop).float()
                z = x @ down.mT
                gram.addmm_(z.mT, z)
                guide[slices[concept]].addmm_(z[:, slices[concept]].mT, z)
                self._tokens[site] += len(x)

    def solve(self, site: str, ridge: float) -> Tensor:
        """R = Q G⁻¹, float64."""
        self._shards.add_up([*self.grams[site], self._tokens[site]])
        gram, guide = (matrix.double() / self._tokens[site] for matrix in self.grams[site])
        gram.diagonal().add_(ridge)
        return torch.linalg.solve(gram, guide.mT).mT
