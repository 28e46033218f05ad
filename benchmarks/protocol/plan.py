"""What is measured: sets of concepts, methods, and what a method is given."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import product
from typing import Any

import numpy as np

from iteris_core import Calibration

from .world import World

SINGLE, BASE = "single", "base"
"""No merges: each LoRA alone, and no LoRA."""


@dataclass(frozen=True)
class Unit:
    """One merge and its pictures. ``trained`` is which of the trainings of the LoRAs it has,
    ``calibration`` fields of it beside the world's half of its templates."""

    method: str
    names: tuple[str, ...]
    replicate: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    trained: int = 0
    calibration: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def key(self) -> str:
        return json.dumps(astuple(self), sort_keys=True)


def sets_of(subjects: Sequence[str], size: int, replicate: int) -> list[tuple[str, ...]]:
    """Sets of ``size`` subjects, in an order of each replicate's own: disjoint ones as far as
    there are; at least two, which then overlap, unless all are merged."""
    order = np.random.default_rng(replicate).permutation(len(subjects))
    count = max(len(subjects) // size, 2 if size < len(subjects) else 1)
    starts = [i * len(subjects) // count for i in range(count)]
    return [
        tuple(subjects[order[(start + i) % len(subjects)]] for i in range(size)) for start in starts
    ]


def styled_pairs(
    subjects: Sequence[str], styles: Sequence[str], replicate: int
) -> list[tuple[str, ...]]:
    """A subject for each style, and every subject once where there are more of them."""
    if not styles:
        return []
    order = np.random.default_rng(replicate).permutation(len(subjects))
    count = max(len(subjects), len(styles))
    return [(subjects[order[i % len(subjects)]], styles[i % len(styles)]) for i in range(count)]


@dataclass(frozen=True)
class Variant:
    """A row of the table: a method with settings and fields of the calibration."""

    label: str
    method: str
    settings: Mapping[str, Any]
    calibration: Mapping[str, Any]

    @classmethod
    def parsed(cls, label: str) -> Variant:
        """From ``METHOD[:FIELD=VALUE]…``, each field the method's or the calibration's."""
        method, *fields = label.split(":")
        pairs = {name: _value(value) for name, _, value in (f.partition("=") for f in fields)}
        of_calibration = set(Calibration.__dataclass_fields__)
        return cls(
            label,
            method,
            {name: value for name, value in pairs.items() if name not in of_calibration},
            {name: value for name, value in pairs.items() if name in of_calibration},
        )

    def unit(self, names: tuple[str, ...], replicate: int, trained: int) -> Unit:
        return Unit(self.method, names, replicate, self.settings, trained, self.calibration)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@dataclass(frozen=True)
class Plan:
    """The merges of a table: ``per_size`` sets of each size at most in each replicate."""

    world: World
    variants: Sequence[Variant]
    sizes: Sequence[int]
    replicates: int
    per_size: int | None = None

    def references(self) -> Iterator[Unit]:
        """Of all sets what each LoRA alone and the base have, each once."""
        known: dict[str, Unit] = {}
        for replicate, size in product(range(self.replicates), self.sizes):
            for names, method in product(self.sets(size, replicate), (SINGLE, BASE)):
                known |= {one.key: one for one in self.references_of(method, names, replicate)}
        yield from known.values()

    def references_of(self, method: str, names: Sequence[str], replicate: int) -> list[Unit]:
        """Those of a set, by concept."""
        trained = 0 if method == BASE else replicate % self.world.trained
        return [Unit(method, (name,), replicate=replicate, trained=trained) for name in names]

    def merges(self) -> Iterator[tuple[Variant, Unit]]:
        """Set by set, so that methods can be paired on what a run that was stopped has."""
        for replicate, size in product(range(self.replicates), self.sizes):
            trained = replicate % self.world.trained
            for names, variant in product(self.sets(size, replicate), self.variants):
                yield variant, variant.unit(names, replicate, trained)

    def sets(self, size: int, replicate: int) -> list[tuple[str, ...]]:
        return sets_of(self.world.subjects, size, replicate)[: self.per_size]
