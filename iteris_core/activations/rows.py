"""The rows of a model's forwards, and the changes that each of them loads.

A merge is fitted to rows that load a LoRA as its users do: alone at strength 1, at another
strength, or beside another LoRA. In a row of strength s, LoRA i's change is s ΔW_i and the merged
one s ΔW, so the fit has s X̃ as its input. A row of several LoRAs, such as a subject in a style,
loads each of them.

The other LoRA, a phantom, belongs to the base: it is on in the reference row and in the merged one.
It is made from one of the merged LoRAs, with random signs of its outputs, so that its effect has a
LoRA's size and no meaning.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from ..lora import LowRank

MERGED = -1
"""The place of the merged change, beside those of the concepts."""


class Load(NamedTuple):
    """The change of ``concept`` at ``strength`` times its own; with a ``seed`` the phantom made
    from it."""

    concept: int
    strength: float = 1.0
    seed: int | None = None


Loads = tuple[Load, ...]


def loads_of(concepts: Sequence[int], strength: float = 1.0) -> Loads:
    return tuple(Load(concept, strength) for concept in concepts)


def strength_of(loads: Loads) -> float:
    """The strength of all but the phantoms."""
    return next((load.strength for load in loads if load.seed is None), 1.0)


def phantoms(loads: Loads) -> Loads:
    return tuple(load for load in loads if load.seed is not None)


def as_merged(loads: Loads) -> Loads:
    """What a merged row loads in place of ``loads``."""
    return (*phantoms(loads), Load(MERGED, strength_of(loads)))


Text = tuple[int, str, Loads]
"""A concept, a prompt of it, and what the text encoders load."""


@dataclass(frozen=True)
class Row:
    """A row of a stage: a concept, what is loaded in it as a reference row, and its inputs.

    - ``number``: its place among the samples' rows, which stages may share.
    - ``prompt``, and ``latent``, the place of its latent among the samples'.
    - ``loads``, and ``text_loads`` in the text encoders: the concept's LoRA, unless given.
    - ``key``: only rows with equal keys may share a forward.
    - ``length``: the size of its inputs, in any unit. Memory is measured on the longest row.
    """

    concept: int
    number: int
    prompt: str = ""
    latent: int = 0
    loads: Loads | None = None
    text_loads: Loads | None = None
    key: Hashable = None
    length: int = 0

    @property
    def loaded(self) -> Loads:
        return loads_of([self.concept]) if self.loads is None else self.loads

    @property
    def text(self) -> Text:
        """What text encoders make of it: equal for rows with the same output."""
        loads = loads_of([self.concept]) if self.text_loads is None else self.text_loads
        return self.concept, self.prompt, loads


@dataclass
class Strengths:
    """The strengths of contiguous rows, as a tensor where they are used."""

    values: list[float]
    _made: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict[Any, Tensor])

    def like(self, inputs: Tensor) -> Tensor | None:
        """(rows,), in the dtype and on the device of ``inputs``, made once; None if all are 1."""
        if all(strength == 1 for strength in self.values):
            return None
        key = inputs.dtype, inputs.device
        if key not in self._made:
            self._made[key] = torch.tensor(self.values).to(inputs, non_blocking=inputs.is_cuda)
        return self._made[key]


@dataclass
class Addition:
    """A change that the rows from ``start`` on add, each at one of the ``strengths``; the strength
    of ``load`` does not count."""

    load: Load
    start: int
    strengths: Strengths

    @property
    def stop(self) -> int:
        return self.start + len(self.strengths.values)


def additions(rows: Sequence[Loads], start: int = 0) -> list[Addition]:
    """What each of ``rows``, of which the first has the place ``start``, adds; phantoms first. Runs
    of rows that load the same change are one addition."""
    found: list[Addition] = []
    latest: dict[tuple[int, int | None], Addition] = {}
    for place, loads in enumerate(rows, start):
        for load in loads:
            key = load.concept, load.seed
            run = latest.get(key)
            if run is None or run.stop != place:
                run = latest[key] = Addition(load, place, Strengths([]))
                found.append(run)
            run.strengths.values.append(load.strength)
    return sorted(found, key=lambda of: of.load.seed is None)


def phantom(name: str, change: LowRank, seed: int) -> LowRank:
    """The phantom of a ``change`` at the site ``name``: the signs of its outputs are random."""
    draw = torch.Generator().manual_seed(crc32(name.encode(), seed))
    signs = 2 * torch.empty(len(change.up)).bernoulli_(0.5, generator=draw) - 1
    signs = signs.to(change.up, non_blocking=change.up.is_cuda)
    return replace(change, up=change.up * signs[:, None])


def phantom_of(changes: Mapping[str, LowRank], strength: float, seed: int) -> dict[str, LowRank]:
    """Site → a phantom's change, made from a LoRA's ``changes`` at ``strength``."""
    return {name: phantom(name, change, seed).scaled(strength) for name, change in changes.items()}
