"""Rank-1 spikes: one direction in which a LoRA changes a layer more than in all others combined.

On some bases (Krea 2's gates) every LoRA learns nearly the same spike. Each LoRA alone looks fine,
but loaded together they apply that change once per LoRA. A merge's targets are each LoRA's own
outputs, so the direction counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..lora import Lora, LowRank

DOMINATES = 0.5
"""Minimum share of ‖ΔW‖²_F in the first singular value of a spike."""
SAME = 0.9
"""Minimum product of the cosines between left and between right singular vectors of equal
spikes."""


class Spike(NamedTuple):
    """The first singular vectors of a change, left (out,) and right (in,), float64."""

    left: Tensor
    right: Tensor


def spike_of(change: LowRank) -> Spike | None:
    """The spike of a change, if it has one."""
    left, upper = torch.linalg.qr(change.up.double())
    right, lower = torch.linalg.qr(change.down.double().mT)
    u, s, vt = torch.linalg.svd(upper @ lower.mT)
    squares = s**2
    if float(squares[0]) <= DOMINATES * float(squares.sum()):
        return None
    return Spike(left @ u[:, 0], right @ vt[0])


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
        if float((one.left @ two.left) * (one.right @ two.right)) >= SAME:
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
