"""IterIS in the row space of all LoRAs together (DESIGN 3.8): kilobytes of statistics a site.

With Z̃ = X̃ Aᵀ, A all down matrices stacked, the change ΔW = [up_1 … up_N] R A is fitted to the
outputs X_i ΔW_iᵀ of each LoRA on the merged model's inputs:

    R = (Σ λ_i E_i H_iᵀ Z̃_i + pull) (Σ λ_i Z̃_iᵀZ̃_i + pull)⁻¹,   H_i = X_i down_iᵀ,

E_i placing concept i's rows, and the pull, α ‖Z̃_iᵀZ̃_i‖_F, going toward the λ-mean of the LoRAs.
SSR-Merge is this with X̃ = X, λ = 1 and a pull toward zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..activations.tokens import Visit
from ..lora import LowRank, concatenate
from ..passes.batches import Batching
from ..passes.job import Job
from ..passes.loops import sweep_pass
from ..report.report import SiteReport
from ..settings import Settings, setting
from .iteris import check_complete
from .registry import ROWS_PER_FORWARD, Merged, method


@dataclass(frozen=True)
class IterisSubspaceSettings(Settings):
    ridge: float = setting(
        1e-5, "How strongly a layer is drawn toward the mean of the LoRAs.", low=0, below=1
    )
    weighting: Literal["tokens", "none"] = setting(
        "tokens",
        "What evens out the concepts: the number of tokens, or nothing.",
        former=("balance",),
    )
    micro_batch: int = setting(32, ROWS_PER_FORWARD, low=1)


@method("iteris-subspace", IterisSubspaceSettings, needs_host=True)
def iteris_subspace(job: Job, settings: IterisSubspaceSettings) -> Merged:
    """IterIS in the row space of all LoRAs together: the smallest statistics."""
    merged: dict[str, tuple[LowRank, SiteReport]] = {}

    def visitor_and_solve() -> tuple[_Subspace, Callable[[str], LowRank]]:
        subspace = _Subspace(job)

        def solve(site: str) -> LowRank:
            stacked = concatenate([c for c in job.references[site] if c is not None])
            router = subspace.solve(site, settings)
            up = (stacked.up.double() @ router).to(stacked.up)
            change = LowRank(up, stacked.down, stacked.kernel)
            merged[site] = change, SiteReport(change.rank)
            return change

        return subspace, solve

    sweep_pass(job, visitor_and_solve, Batching(settings.micro_batch))
    check_complete(job, merged)
    return merged


@dataclass
class _Moments:
    """Per concept: Z̃ᵀZ̃, (R, R), and HᵀZ̃, (r_i, R); None where the LoRA leaves the site alone."""

    stacked: Tensor
    own: list[Tensor]
    cross: list[Tensor | None]
    tokens: Tensor


class _Subspace:
    def __init__(self, job: Job) -> None:
        self._task = job
        self._sites: dict[str, _Moments] = {}

    def visit(self, visit: Visit) -> None:
        changes = self._task.references[visit.site]
        moments = self._sites.get(visit.site)
        if moments is None:
            moments = self._sites[visit.site] = self._start(visit)
        for concept, start, stop in visit.spans:
            seen = visit.input_tokens(start, stop, merged=True).float()
            merged = seen @ moments.stacked.mT
            moments.own[concept].addmm_(merged.mT, merged)
            moments.tokens[concept] += len(merged)
            change, cross = changes[concept], moments.cross[concept]
            if change is not None and cross is not None:
                x = visit.input_tokens(start, stop).float()
                hidden = x @ change.down.to(x).mT
                cross.addmm_(hidden.mT, merged)

    def _start(self, visit: Visit) -> _Moments:
        changes = self._task.references[visit.site]
        device = visit.inputs.device
        downs = [c.down.to(device, torch.float32) for c in changes if c is not None]
        stacked = torch.cat(downs)
        width = len(stacked)
        return _Moments(
            stacked,
            [torch.zeros(width, width, device=device) for _ in changes],
            [None if c is None else torch.zeros(c.rank, width, device=device) for c in changes],
            torch.zeros(len(changes), dtype=torch.float64, device=device),
        )

    def solve(self, site: str, settings: IterisSubspaceSettings) -> Tensor:
        """R, (Σ r_i, Σ r_i), float64."""
        moments = self._sites.pop(site)
        crosses = [cross for cross in moments.cross if cross is not None]
        self._task.shards.add_up([*moments.own, *crosses, moments.tokens])
        width = len(moments.stacked)
        left = torch.zeros(width, width, dtype=torch.float64, device=moments.stacked.device)
        right = torch.zeros_like(left)
        start = 0
        for own, cross, tokens, weight in zip(
            moments.own, moments.cross, moments.tokens.tolist(), self._task.weights, strict=True
        ):
            value = weight / max(tokens, 1) if settings.weighting == "tokens" else weight
            pull = value * settings.ridge * float(own.double().norm())
            left.add_(own.double(), alpha=value)
            left.diagonal().add_(pull)
            if cross is not None:
                rows = slice(start, start + len(cross))
                right[rows] += value * cross.double()
                right[rows, rows].diagonal().add_(pull)
                start += len(cross)
        # Row spaces may overlap: the least-norm solution where the matrix is singular.
        return right @ torch.linalg.pinv(left, hermitian=True, rtol=1e-12)
