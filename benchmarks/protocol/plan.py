"""What is measured: sets of concepts, methods, regimes and replicates, the most telling first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import product
from typing import Any

import numpy as np

REGIMES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "few": {"samples": 1, "timesteps": 1},
}
"""What is collected for a merge: our defaults; one prompt at one timestep a LoRA, as SSR-Merge."""

BETWEEN: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "2x2": ({"samples": 2, "timesteps": 2}, "few"),
    "6x1": ({"samples": 6, "timesteps": 1}, "few"),
    "12x4": ({"samples": 12, "timesteps": 4}, "default"),
}
"""What is collected between the two, and of which of them rivals have their settings."""


def collected(regime: str) -> Mapping[str, Any]:
    """What a regime, or one between, says of the calibration."""
    return REGIMES[regime] if regime in REGIMES else BETWEEN[regime][0]


SINGLE, BASE, OURS = "single", "base", "iteris"
POLISHED = "iteris-polished"
OWN: Mapping[str, Mapping[str, Any]] = {OURS: {}, POLISHED: {"block_steps": 120}}
"""Ours, with its defaults, and with the steps of the preset ``best`` on as many prompts. These take
long and follow what was collected: of 50 prompts only."""
SWITCHED = "k-lora"
"""Both LoRAs' files, of which each layer has one at each step: of a subject with a style only."""
METHODS = (
    SINGLE,
    BASE,
    OURS,
    "ssr",
    "regmean++",
    POLISHED,
    SWITCHED,
    "regmean",
    "ties",
    "dare-linear",
    "average",
    "task-arithmetic",
    "knots",
    "orthogonal",
    "ace",
    "chain-of-merges",
    "wudi",
    "della",
    "loraclr",
    "gradient-fusion",
    "dare-ties",
    "custom-diffusion",
    "della-linear",
    "sum",
    "svd",
    "iteris-subspace",
)
"""From the most telling to the least, so that a run which is stopped has the first ones."""

REPLICATES = 3
"""Each has its own training of the LoRAs, calibration seed, picture seed and sets, so that the
spread over sets and replicates holds all of them."""

Settings = Callable[[str, int, str], Mapping[str, Any]]
"""(method, how many are merged, regime) → settings of the method"""


@dataclass(frozen=True)
class Unit:
    """One merge and its pictures. ``styled`` marks a subject with a style in one picture;
    ``trained`` is which of the trainings of the LoRAs it has."""

    method: str
    names: tuple[str, ...]
    regime: str = "default"
    replicate: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    styled: bool = False
    trained: int = 0

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


def uses_data(method: str) -> bool:
    """Whether regimes differ for it: a method that only looks at weights has one result."""
    from iteris_core.methods import find_method

    return method not in (SINGLE, BASE, SWITCHED) and find_method(merged_by(method)).needs_host


def merged_by(method: str) -> str:
    """The registered method of a row."""
    return OURS if method in OWN else method


def regimes_of(method: str, regimes: Sequence[str]) -> Sequence[str]:
    """Those in which it is measured."""
    return regimes if uses_data(method) and method != POLISHED else ("default",)


def units(
    subjects: Sequence[str],
    styles: Sequence[str],
    sizes: Sequence[int],
    settings: Settings,
    *,
    methods: Sequence[str] = METHODS,
    regimes: Sequence[str] = tuple(REGIMES),
    replicates: int = REPLICATES,
    trained: int = 1,
) -> Iterator[Unit]:
    """All that is to be measured, replicate by replicate, and in each method by method."""
    for replicate, method in product(range(replicates), methods):
        which = 0 if method == BASE else replicate % trained
        if method in (SINGLE, BASE):
            yield from (
                Unit(method, (name,), replicate=replicate, trained=which) for name in subjects
            )
        elif method != SWITCHED:
            for regime in regimes_of(method, regimes):
                for size in sizes:
                    own = settings(method, size, regime)
                    for names in sets_of(subjects, size, replicate):
                        yield Unit(method, names, regime, replicate, own, trained=which)
        for pair in styled_pairs(subjects, styles, replicate):
            for regime in regimes_of(method, regimes):
                own = {} if method in (SINGLE, BASE) else settings(method, 2, regime)
                yield Unit(method, pair, regime, replicate, own, True, which)
