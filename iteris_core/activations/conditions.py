"""How a file is loaded where a row stands for its use: at another strength, beside another LoRA.

Rows with the LoRAs at strength 1 and nothing beside them leave open what a merge does elsewhere. In
a row of strength s, LoRA i's change is s ΔW_i and the merged one s ΔW, so the fit has s X̃ as its
input. Another LoRA, the phantom, is on in both copies of a row and belongs to the base there. It is
made from one of the merged LoRAs: its inputs, with random signs of its outputs, so that its effect
has a LoRA's size and no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor

from ..lora import LowRank
from .site import Site


@dataclass(frozen=True)
class Condition:
    """The ``strength`` of a row's LoRA and of the merged one. The phantom is made from the LoRA of
    the concept ``phantom`` (None: there is none), at ``beside`` times its strength, by ``seed``."""

    strength: float = 1.0
    phantom: int | None = None
    beside: float = 0.0
    seed: int = 0


PLAIN = Condition()


def under_conditions(
    name: str,
    site: Site,
    conditions: Sequence[Condition],
    inputs: Tensor,
    outputs: Tensor,
    change_of: Callable[[int, Tensor], LowRank | None],
) -> Tensor | None:
    """Add the rows' phantoms to ``outputs`` in place; returns the rows' strengths, (rows,), or None
    if all are 1.

    ``inputs`` and ``outputs`` are the tensors of ``site`` called ``name``, rows first, every row as
    often as there are copies. ``change_of(concept, inputs)`` is a LoRA's change in the inputs'
    dtype.
    """
    rows = len(conditions)
    others = [row for row, of in enumerate(conditions) if of.phantom is not None]
    signs = torch.empty(len(others), site.shape[0])
    for index, row in enumerate(others):
        signs[index] = _signs(name, conditions[row].seed, site.shape[0])
    signs = signs.to(inputs)  # of all rows at once
    for index, row in enumerate(others):
        of = conditions[row]
        change = change_of(of.phantom, inputs) if of.phantom is not None else None
        if change is not None:
            phantom = replace(change, up=change.up * (signs[index] * of.beside)[:, None])
            outputs[row::rows] += site.delta(phantom, inputs[row::rows])
    if all(of.strength == 1 for of in conditions):
        return None
    return torch.tensor([of.strength for of in conditions]).to(inputs).repeat(len(inputs) // rows)


def phantom_of(changes: Mapping[str, LowRank], strength: float, seed: int) -> dict[str, LowRank]:
    """Site → a phantom's change, made from a LoRA's ``changes`` at ``strength``."""
    return {
        name: replace(
            change,
            up=change.up * (_signs(name, seed, len(change.up)) * strength).to(change.up)[:, None],
        )
        for name, change in changes.items()
    }


def _signs(name: str, seed: int, count: int) -> Tensor:
    """A sign for every output of the site ``name``, (count,), 1 or -1."""
    draw = torch.Generator().manual_seed(crc32(name.encode(), seed))
    return 2 * torch.empty(count).bernoulli_(0.5, generator=draw) - 1


def added(
    site: Site, change: LowRank, inputs: Tensor, outputs: Tensor, strengths: Tensor | None
) -> None:
    """Add the ``change`` to ``outputs`` in place, in each row at its strength (None: 1)."""
    if strengths is None:
        site.add(change, inputs, outputs)
    else:
        outputs += by_row(site.delta(change, inputs), strengths)


def by_row(values: Tensor, strengths: Tensor | None) -> Tensor:
    """``values``, rows first, times each row's strength (None: 1)."""
    if strengths is None:
        return values
    return values * strengths.reshape(-1, *[1] * (values.ndim - 1))
