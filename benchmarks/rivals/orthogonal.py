"""Null-space projection (NP-LoRA, arXiv 2511.11051): later LoRAs keep out of earlier ones' inputs.

LoRA i reads only the part of its inputs that is orthogonal to the row spaces of LoRAs 1 … i−1:
down_i ← down_i (I − μ/(1+μ) V Vᵀ), V an orthonormal basis of those row spaces; μ → ∞ is the hard
projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iteris_core.lora import LowRank, concatenate
from iteris_core.methods.registry import AtSite, on_weights
from iteris_core.settings import Settings, setting


@dataclass(frozen=True)
class OrthogonalSettings(Settings):
    softness: float = setting(0.0, "1/μ; 0 is the hard projection.", low=0)
    scale: float = setting(1.0, "What the sum is multiplied by.")


@on_weights("orthogonal", OrthogonalSettings)
def orthogonal(at: AtSite, settings: OrthogonalSettings) -> tuple[LowRank, float]:
    """Each LoRA outside the row spaces of those before it, then the sum (NP-LoRA)."""
    taken = 1.0 / (1.0 + settings.softness)
    parts: list[LowRank] = []
    rows: list[torch.Tensor] = []
    for change in at.weighted():
        down = original = change.down.double()
        if rows:
            basis = torch.linalg.qr(torch.cat(rows).mT)[0]
            down = down - taken * (down @ basis) @ basis.mT
        rows.append(original)
        parts.append(LowRank(settings.scale * change.up, down.to(change.down), change.kernel))
    return concatenate(parts), 0.0
