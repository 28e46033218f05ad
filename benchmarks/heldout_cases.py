"""What :mod:`heldout_error` measures: its cases, part by part, and the table that a part makes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

PAIRS = (3, 5), (8, 9)
FIVE = (2, 3, 5, 7, 9)
TEN = tuple(range(1, 11))
LATENTS = 8
GRID = ((50, 4), (50, 2), (50, 1), (25, 4), (25, 2), (25, 1), (12, 4), (12, 2))
"""Prompts and timesteps of each concept"""
FEWER = {"samples": 25}
"""For ten concepts, which take long."""


@dataclass(frozen=True)
class Case:
    """What differs from the defaults; ``policy`` is a name in
    :data:`heldout_error.POLICIES`."""

    numbers: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    calibration: Mapping[str, Any] = field(default_factory=dict[str, Any])
    policy: str = ""

    @property
    def said(self) -> str:
        """All but the set."""
        differing = {**self.calibration, **self.settings}
        said = [f"{name}={value}" for name, value in differing.items()]
        return ", ".join([*said, *([self.policy] if self.policy else [])]) or "default"

    @property
    def key(self) -> str:
        return f"{'+'.join(map(str, self.numbers))}: {self.said}"


def rows() -> Iterator[Case]:
    for numbers, (samples, timesteps) in itertools.product((*PAIRS, FIVE), GRID):
        yield Case(numbers, {}, of(samples=samples, timesteps=timesteps))
    for samples, timesteps in GRID[:4]:
        yield Case(PAIRS[0], {}, of(samples=samples, timesteps=timesteps, latent_size=2 * LATENTS))


def of(**calibration: Any) -> dict[str, Any]:
    """Without what is the default."""
    usual = {"samples": 50, "timesteps": 4, "latent_size": LATENTS}
    return {name: value for name, value in calibration.items() if usual.get(name) != value}


def empty() -> Iterator[Case]:
    for numbers, share in itertools.product(PAIRS, (0.0, 0.1, 0.2, 0.4)):
        yield Case(numbers, {}, {"empty_share": share} if share != 0.2 else {})


def ridge() -> Iterator[Case]:
    for numbers, value in itertools.product((*PAIRS, FIVE), (None, 1e-7, 1e-5, 1e-4)):
        yield Case(numbers, {} if value is None else {"ridge": value})
    for value in (4e-6, 1.6e-5, 6.4e-5):
        yield Case(PAIRS[0], {"ridge": value}, of(timesteps=1))


def few() -> Iterator[Case]:
    """Few prompts, by the rule and at fixed ridges."""
    counts = (of(samples=12), of(samples=6, timesteps=1))
    for calibration, numbers, value in itertools.product(counts, PAIRS, (None, 1e-6, 1e-5, 1e-4)):
        yield Case(numbers, {} if value is None else {"ridge": value}, calibration)


def repair() -> Iterator[Case]:
    for numbers in (*PAIRS, FIVE):
        yield Case(numbers)
        yield Case(numbers, {"repair": False})
        for share in (1.0, 0.5, 0.25):
            if share != (0.5 if len(numbers) == 2 else 1.0):  # the default
                yield Case(numbers, {"repair_inputs": share})
    for settings in ({}, {"repair": False}):
        yield Case(TEN, settings, FEWER)


def rank() -> Iterator[Case]:
    for numbers in (*PAIRS, FIVE, TEN):
        calibration = FEWER if numbers == TEN else {}
        yield Case(numbers, {}, calibration)
        yield Case(numbers, {"rank": 8}, calibration)


def guidance() -> Iterator[Case]:
    for numbers in (*PAIRS, FIVE):
        yield Case(numbers)
        yield Case(numbers, {}, {"guidance": 2.5})


def tokens() -> Iterator[Case]:
    """Of 256 a row, at 25 prompts."""
    for count in ("all", 128, 64, 32):
        yield Case(PAIRS[0], {"row_tokens": count}, of(samples=25, latent_size=2 * LATENTS))


def directions() -> Iterator[Case]:
    for numbers in (*PAIRS, FIVE):
        yield Case(numbers, {}, FEWER)
        yield Case(numbers, {}, FEWER, "few directions")


PARTS = {
    part.__name__: part
    for part in (rows, empty, ridge, few, repair, rank, guidance, tokens, directions)
}


def table(known: Mapping[str, Mapping[str, float]], part: str) -> list[tuple[str, list[float]]]:
    """What differs → the guided error of the two pairs (their mean), of five and of all ten, nan
    where it was not measured. What concerns one pair alone says which."""
    cases: dict[str, list[Case]] = {}
    for case in PARTS[part]():
        said = case.said.replace("samples=25", "default") if len(case.numbers) == 10 else case.said
        cases.setdefault(said.removeprefix("default, "), []).append(case)
    found: list[tuple[str, list[float]]] = []
    for said, some in cases.items():
        cells: list[list[float]] = [[], [], []]
        measured = [case for case in some if case.key in known]
        for case in measured:
            cells[{2: 0, 5: 1, 10: 2}[len(case.numbers)]].append(known[case.key]["guided"])
        if len(cells[0]) == 1:
            [pair] = [case.numbers for case in measured if len(case.numbers) == 2]
            said += f" (pair {pair[0]}, {pair[1]})"
        found.append((said, [fmean(cell) if cell else float("nan") for cell in cells]))
    return found
