"""Ranks shared out over a LoRA's layers, by their worth at the layers' outputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..linalg import truncate_factors, truncate_matrix
from ..lora import LowRank


@dataclass(frozen=True)
class Components:
    """``change`` with its components in descending order of their energies e_k. ``worths`` are e_k
    / √(E·Y), with E the energy that the change adds and Y that of the layer's whole output. A layer
    counts by √(E / Y), the size of its addition relative to its output, and a component by its
    share of E. ``total`` is √(E / Y); there may be more components than these."""

    change: LowRank
    worths: Tensor
    total: float

    @staticmethod
    def of(change: LowRank, root: Tensor | None = None, output: float = 1.0) -> Components:
        """For inputs with second moment L Lᵀ, where L is ``root``, (in, in); without it every input
        counts equally. ``output`` is the mean energy of the layer's whole outputs."""
        ordered = truncate_factors(change, min(change.rank, *change.shape), root)[0]
        return Components._ordered(ordered, root, output, 0.0)

    @staticmethod
    def of_dense(
        dense: Tensor,
        root: Tensor | None,
        output: float,
        most: int,
        kernel: tuple[int, int] | None = None,
    ) -> Components:
        """The same for the first ``most`` components of a full change, (out, in)."""
        like = LowRank(dense.new_zeros(1, 1).float(), dense.new_zeros(1, 1).float(), kernel)
        matrix = dense.double()
        if root is not None:
            matrix = (matrix @ root.to(matrix)) @ root.to(matrix).mT
        cut, lost = truncate_matrix(matrix, min(most, *dense.shape), root, like=like)
        return Components._ordered(cut, root, output, lost)

    @staticmethod
    def _ordered(change: LowRank, root: Tensor | None, output: float, lost: float) -> Components:
        down = change.down.double()
        down = down if root is None else down @ root.to(down)
        energies = change.up.double().square().sum(0) * down.square().sum(1)
        whole = float(energies.sum()) / max(1 - lost, 1e-12)
        worths = energies / max(math.sqrt(whole * output), 1e-30)
        return Components(change, worths, math.sqrt(whole / max(output, 1e-30)))

    def at(self, rank: int) -> LowRank:
        change = self.change
        return LowRank(change.up[:, :rank], change.down[:rank], change.kernel)


def share_numbers(
    sites: Mapping[str, Components], numbers: int, first: Collection[str] | None = None
) -> dict[str, int]:
    """Site → its rank in a file with that many ``numbers``. If sites come ``first``, these and then
    all others start at rank 1, as long as there are numbers left."""
    ranks, left, closed = dict.fromkeys(sites, 0), numbers, set[str]()
    every = by_worth(sites)
    if first is not None:  # sorting keeps the order by worth
        every.sort(key=lambda one: (one[0] > 0, one[0] == 0 and one[2] not in first))
    for _, _, site in every:
        if _cost(sites[site].change) > left:
            closed.add(site)
        if site not in closed:
            ranks[site] += 1
            left -= _cost(sites[site].change)
    return ranks


def by_worth(sites: Mapping[str, Components]) -> list[tuple[int, float, str]]:
    """(index within its site, worth, site) of every component, those with the most worth per number
    first."""
    every = [
        (worth / _cost(one.change), worth, site, place)
        for site, one in sites.items()
        for place, worth in enumerate(one.worths.tolist())
    ]
    return [(place, worth, site) for _, worth, site, place in sorted(every, reverse=True)]


def _cost(change: LowRank) -> int:
    """Count of numbers in a component."""
    return sum(change.shape)
