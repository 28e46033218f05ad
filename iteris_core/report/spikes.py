"""Rank-1 spikes: one direction in which a LoRA changes a layer more than in all others combined.

On some bases (Krea 2's gates) every LoRA learns nearly the same spike. Each LoRA alone looks fine,
but loaded together they apply that change once per LoRA. A merge's targets are each LoRA's own
outputs, so the direction counts once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cosine_similarity

from ..linalg.lowrank import truncate_factors
from ..lora import Lora, LowRank

DOMINATES = 0.5
"""Minimum share of ‖ΔW‖²_F in the first singular value of a spike."""
SAME = 0.9
"""Minimum product of the cosines between left and between right singular vectors of equal
spikes."""


def spike_of(change: LowRank) -> LowRank | None:
    """The spike of a change, as a change of rank 1 in float64, if it has one."""
    first, lost = truncate_factors(change.to(torch.float64), 1)
    return first if lost < 1 - DOMINATES else None


def shared_spikes(first: Lora, second: Lora) -> list[str]:
    """The sites where both LoRAs have the same spike, with the same sign."""
    found: list[str] = []
    for site, change in first.sites.items():
        other = second.sites.get(site)
        if other is None or other.shape != change.shape:
            continue
        one, two = spike_of(change), spike_of(other)
        if one is None or two is None:
            continue
        left = cosine_similarity(one.up, two.up, dim=0)
        if float(left * cosine_similarity(one.down, two.down, dim=1)) >= SAME:
            found.append(site)
    return found


def spike_note(sites: Sequence[str], first: str, second: str) -> str:
    """A sentence about the ``sites`` of :func:`shared_spikes`."""
    layers = f"{len(sites)} layer{'s' if len(sites) > 1 else ''}"
    named = ", ".join([*sites[:3], *(["…"] if len(sites) > 3 else [])])
    return (
        f"{first} and {second} share a spike in {layers} ({named}): loaded together, that change "
        "counts twice. Merge them."
    )
