"""Null-space projection (NP-LoRA, arXiv 2511.11051): later LoRAs keep out of earlier ones' inputs.

LoRA i reads only the part of its inputs that is orthogonal to the row spaces of LoRAs 1 … i−1:
down_i ← down_i (I − μ/(1+μ) V Vᵀ), V an orthonormal basis of those row spaces; μ → ∞ is the hard
projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..lora import LowRank, concatenate
from ..passes.job import Job
from ..report.report import SiteReport
from ..settings import Settings, setting
from .registry import Merged, method


@dataclass(frozen=True)
class OrthogonalSettings(Settings):
    softness: float = setting(0.0, "1/μ; 0 is the hard projection.", low=0)
    scale: float = setting(1.0, "What the sum is multiplied by.")


@method("orthogonal", OrthogonalSettings, needs_host=False)
def orthogonal(job: Job, settings: OrthogonalSettings) -> Merged:
    """Each LoRA outside the row spaces of those before it, then the sum (NP-LoRA)."""
    merged: dict[str, tuple[LowRank, SiteReport]] = {}
    for site, changes in job.references.items():
        parts: list[LowRank] = []
        rows: torch.Tensor | None = None
        for change, weight in zip(changes, job.weights, strict=True):
            if change is None:
                continue
            down = change.down.double()
            if rows is not None:
                taken = 1.0 / (1.0 + settings.softness)
                basis = torch.linalg.qr(rows.mT)[0]
                down = down - taken * (down @ basis) @ basis.mT
            rows = change.down.double() if rows is None else torch.cat([rows, change.down.double()])
            parts.append(
                LowRank(settings.scale * weight * change.up, down.to(change.down), change.kernel)
            )
        total = concatenate(parts)
        merged[site] = total, SiteReport(total.rank)
    return merged
