"""The trim of TIES: a LoRA's largest entries stay, as a share of those of all sites together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

_HALF = 16  # bits of a magnitude that are counted at a time
_LOWER = (1 << _HALF) - 1


def least_kept(
    sites: Callable[[], Iterable[Mapping[int, Tensor]]], density: float
) -> dict[int, float]:
    """concept → the magnitude that the ``density`` share of its entries reaches; none at 1.

    ``sites()`` gives every site's entries of each concept, twice. Magnitudes are float32, whose
    bits are in their order: the first pass counts them by their upper half, the second those that
    share the answer's upper half by the lower one. An equivalent is ``torch.kthvalue`` of all
    entries at once.
    """
    if density == 1:
        return {}
    counts = _counted(sites(), lambda _, bits: bits >> _HALF)
    kept = {i: max(1, int(density * int(count.sum()))) for i, count in counts.items()}
    upper = {i: _largest(count, kept[i]) for i, count in counts.items()}
    counts = _counted(sites(), lambda i, bits: bits[bits >> _HALF == upper[i][0]] & _LOWER)
    return {
        i: _value((upper[i][0] << _HALF) + _largest(count, upper[i][1])[0])
        for i, count in counts.items()
    }


def magnitudes(entries: Tensor) -> Tensor:
    """What entries are compared by, float32."""
    return entries.abs().float()


def _counted(
    sites: Iterable[Mapping[int, Tensor]], of: Callable[[int, Tensor], Tensor]
) -> dict[int, Tensor]:
    """concept → how often each number comes that ``of`` makes of its entries' bits."""
    counts: dict[int, Tensor] = defaultdict(lambda: torch.zeros(1 << _HALF, dtype=torch.int64))
    for site in sites:
        for concept, entries in site.items():
            bits = magnitudes(entries).flatten().view(torch.int32)
            counts[concept] += torch.bincount(of(concept, bits), minlength=1 << _HALF).cpu()
    return counts


def _largest(count: Tensor, place: int) -> tuple[int, int]:
    """The number at a ``place`` from the largest, and its place among its like."""
    above = count.flip(0).cumsum(0)
    larger = int((above < place).sum())
    return len(count) - 1 - larger, place - (int(above[larger - 1]) if larger else 0)


def _value(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
