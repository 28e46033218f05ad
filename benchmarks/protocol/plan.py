"""What is measured: sets of concepts, methods, and what a method is given."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from iteris_core import Calibration

from .world import World

SINGLE, BASE = "single", "base"
"""No merges: each LoRA alone, and no LoRA."""


@dataclass(frozen=True)
class Unit:
    """One merge and its pictures. ``trained`` is which of the trainings of the LoRAs it has,
    ``calibration`` fields of it beside the world's half of its templates. Without ``names`` it is a
    method of a table."""

    method: str
    names: tuple[str, ...] = ()
    replicate: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    trained: int = 0
    calibration: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def key(self) -> str:
        return json.dumps(astuple(self), sort_keys=True)

    @classmethod
    def parsed(cls, label: str) -> Unit:
        """A method without concepts, from ``METHOD[:FIELD=VALUE]…``, each field the method's or the
        calibration's. The method of a folder is the function ``merge`` of its ``method.py``
        (``open/README.md``)."""
        method, *fields = label.split(":")
        pairs = {name: _value(value) for name, _, value in (f.partition("=") for f in fields)}
        calibration = {n: v for n, v in pairs.items() if n in Calibration.__dataclass_fields__}
        settings = {name: value for name, value in pairs.items() if name not in calibration}
        if (file := Path(method) / "settings.json").is_file():
            settings = {**json.loads(file.read_text(encoding="utf-8")), **settings}
        return cls(method, settings=settings, calibration=calibration)

    @classmethod
    def of(cls, key: str) -> Unit:
        method, names, *rest = json.loads(key)
        return cls(method, tuple(names), *rest)

    @property
    def label(self) -> str:
        """``METHOD[:FIELD=VALUE]…``, settings before fields of the calibration."""
        fields = [*sorted(self.settings.items()), *sorted(self.calibration.items())]
        values = ((name, of if isinstance(of, str) else json.dumps(of)) for name, of in fields)
        return ":".join([self.method, *(f"{name}={value}" for name, value in values)])


def sets_of(subjects: Sequence[str], size: int, replicate: int) -> list[tuple[str, ...]]:
    """Sets of ``size`` subjects, in an order of each replicate's own: disjoint ones as far as
    there are; at least two, which then overlap, unless all are merged."""
    order = np.random.default_rng(replicate).permutation(len(subjects))
    count = max(len(subjects) // size, 2 if size < len(subjects) else 1)
    starts = [i * len(subjects) // count for i in range(count)]
    return [
        tuple(subjects[order[(start + i) % len(subjects)]] for i in range(size)) for start in starts
    ]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@dataclass(frozen=True)
class Plan:
    """The merges of a table: ``per_size`` sets of each size at most in each replicate."""

    world: World
    variants: Sequence[Unit]
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

    def merges(self) -> Iterator[Unit]:
        """Set by set, so that methods can be paired on what a run that was stopped has."""
        for replicate, size in product(range(self.replicates), self.sizes):
            trained = replicate % self.world.trained
            for names, variant in product(self.sets(size, replicate), self.variants):
                yield replace(variant, names=names, replicate=replicate, trained=trained)

    def sets(self, size: int, replicate: int) -> list[tuple[str, ...]]:
        return sets_of(self.world.subjects, size, replicate)[: self.per_size]
