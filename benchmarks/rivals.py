"""The methods that IterIS is held against: settings as published, and a search for the best ones.

``methods`` are those of the language and the caption tables, as published, the same in both.
``tuned`` looks for the settings of any method at a number of concepts, on sets that are not
reported: along one setting after another, from the published ones on. A grid grows at its edge as
long as the best lies there, so that the optimum is inside, or at the setting's limit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iteris_core import SettingsError
from iteris_core.methods import find_method
from iteris_core.settings import declared_settings

Methods = dict[str, tuple[str, dict[str, Any]]]
"""Name in a table → method and settings"""

RIVALS: Methods = {
    "linear": ("average", {}),
    "task-arithmetic": ("task-arithmetic", {"scale": 0.4}),
    "ties": ("ties", {"density": 0.2, "scale": 1.0}),
    "dare": ("dare-linear", {"density": 0.5, "scale": 0.4}),
    "regmean": ("regmean", {"shrink": 0.9}),
    "ssr": ("ssr", {}),
}
"""Task arithmetic and TIES by their papers' advice for data that nobody tuned on; DARE on top of
task arithmetic."""


def methods(iterations: int, ridge: float) -> Methods:
    """The rivals, our defaults, and Algorithm 1 with the paper's iterations and α of that task."""
    paper = {
        "objective": "adapter",
        "schedule": "jacobi",
        "iterations": iterations,
        "weighting": "adapter",
        "ridge": ridge,
    }
    return {**RIVALS, "iteris": ("iteris", {}), "iteris-paper": ("iteris", paper)}


Score = Callable[[str, int, Mapping[str, Any]], float]
"""``score(method, k, settings)``: how good the settings are with k concepts; more is better."""

LONGEST = 8
"""How many values a grid grows by. By then a ratio of 2 is 256, and a grid by differences is four
times as long: what still gets better has no optimum worth the name."""


@dataclass(frozen=True)
class Axis:
    """The values of a setting, in order. A grid of numbers goes on beyond its edges by the last
    difference, or with ``times`` by the last ratio."""

    values: tuple[Any, ...]
    times: bool = False

    def beyond(self, values: Sequence[Any], *, up: bool) -> Any:
        """The next value, not yet held against the setting's limits; None where there is none."""
        if len(values) < 2 or isinstance(values[0], bool | str):
            return None
        edge, before = (values[-1], values[-2]) if up else (values[0], values[1])
        value = edge * edge / before if self.times else 2 * edge - before
        if isinstance(edge, int):
            return round(value)
        return float(f"{value:.6g}")


Grid = Mapping[str, Axis]


def steps(*values: Any) -> Axis:
    return Axis(values)


def ratios(*values: Any) -> Axis:
    return Axis(values, times=True)


_SCALE = steps(0.5, 0.7, 0.9)
_SHRINK = steps(0.8, 0.9, 1.0)

GRIDS: dict[str, Grid] = {
    "iteris": {},
    "average": {},
    "sum": {},
    "svd": {},
    "task-arithmetic": {"scale": steps(0.4, 0.55, 0.7)},
    "ties": {"density": steps(0.2, 0.5, 0.8), "scale": steps(0.7, 1.0, 1.3)},
    "dare-linear": {"density": steps(0.5, 0.7, 0.9), "scale": steps(0.4, 0.6, 0.8)},
    "dare-ties": {"density": steps(0.5, 0.7, 0.9), "scale": steps(0.6, 0.8, 1.0)},
    "della": {
        "density": steps(0.5, 0.7, 0.9),
        "window": steps(0.06, 0.14, 0.22),
        "scale": steps(0.7, 0.9, 1.1),
    },
    "della-linear": {
        "density": steps(0.5, 0.7, 0.9),
        "window": steps(0.06, 0.14, 0.22),
        "scale": _SCALE,
    },
    "knots": {"density": steps(0.3, 0.6, 0.9), "scale": steps(0.7, 1.0, 1.3)},
    "orthogonal": {"softness": steps(0.0, 1.0, 2.0), "scale": _SCALE},
    "wudi": {
        "solution": steps("adam", "closed"),
        "rate": ratios(1e-5, 1e-4, 1e-3),
        "scale": steps(0.6, 0.8, 1.0),
    },
    "ace": {
        "uneven": ratios(0.3, 3.0, 30.0),
        "ridge": ratios(1e-3, 1e-2, 1e-1),
        "scale": steps(0.6, 0.8, 1.0),
    },
    "tsv-m": {"scale": _SCALE},
    "iso-c": {"scale": _SCALE},
    "core-space": {
        "density": steps(0.25, 0.5, 0.75),
        "isotropic": steps(False, True),
        "scale": steps(0.7, 1.0, 1.3),
    },
    "compress-then-merge": {
        "density": steps(0.25, 0.5, 0.75),
        "own_norm": steps(0.0, 0.25, 0.5),
        "scale": steps(0.5, 0.75, 1.0),
    },
    "pico": {"merge": steps("mean", "tsv-m"), "scale": steps(0.7, 1.0, 1.3)},
    "regmean": {"shrink": _SHRINK},
    "regmean++": {"shrink": _SHRINK},
    "chain-of-merges": {"shrink": _SHRINK, "ridge": ratios(1e-7, 1e-6, 1e-5)},
    "gradient-fusion": {
        "steps": ratios(25, 50, 100, 200),
        "text_steps": ratios(125, 250, 500),
    },
    "loraclr": {
        "rate": ratios(1e-4, 3e-4, 9e-4),
        "steps": ratios(50, 100, 200),
        "margin": ratios(0.5, 5.0, 50.0),
    },
    # Wide from the start: with few tokens its score has a second, lower top at a small ridge.
    "ssr": {"ridge": ratios(1e-4, 1e-3, 1e-2, 1e-1, 1.0)},
    "custom-diffusion": {"ridge": ratios(1e-8, 1e-7, 1e-6)},
    "iteris-subspace": {"ridge": ratios(1e-6, 1e-5, 1e-4)},
}
"""Where the search of each method begins: around what its authors give."""


def tuned(method: str, k: int, score: Score, grids: Mapping[str, Grid] = GRIDS) -> dict[str, Any]:
    """The settings with the best ``score`` at ``k`` concepts: better than with any one of them
    moved to another value of its grid, and than at the edges of the grids."""
    grid = grids[method]
    search = _Search(method, grid, lambda settings: score(method, k, settings))
    best = {name: search.start(name) for name in grid}
    if not best:
        return best
    while True:
        before = dict(best)
        for name in grid:
            best = search.along(name, best)
        if best == before:
            return best


class _Search:
    """The values of every setting so far, and the scores, each measured once."""

    def __init__(
        self, method: str, grid: Grid, score: Callable[[Mapping[str, Any]], float]
    ) -> None:
        self._kind, self._grid, self._score = find_method(method).settings, grid, score
        self._name = method
        self._values = {name: list(axis.values) for name, axis in grid.items()}
        self._known: dict[str, float] = {}

    def start(self, name: str) -> Any:
        """The method's default where it is in the grid, else what is in the grid's middle."""
        values, default = self._values[name], declared_settings(self._kind)[name].default
        return default if default in values else values[len(values) // 2]

    def along(self, name: str, best: Mapping[str, Any]) -> dict[str, Any]:
        """``best`` with the best value of one setting, its grid grown until that is inside."""
        values = self._values[name]
        chosen = dict(best)
        for value in values:
            chosen = self._better(chosen, {**best, name: value})
        for up in (True, False):
            while chosen[name] == values[-1 if up else 0]:
                beyond = self._beyond(name, chosen, up=up)
                if beyond is None:
                    break
                values.insert(len(values) if up else 0, beyond)
                chosen = self._better(chosen, {**best, name: beyond})
        return chosen

    def _beyond(self, name: str, best: Mapping[str, Any], *, up: bool) -> Any:
        """The next value that the method takes: the grid's own, or the limit; None at the limit."""
        values, declared = self._values[name], declared_settings(self._kind)[name]
        if len(values) >= len(self._grid[name].values) + LONGEST:
            return None
        edge = values[-1 if up else 0]
        limit = declared.high if up else declared.low
        for value in (self._grid[name].beyond(values, up=up), limit):
            if value is None or value in values or (value > edge) != up:
                continue
            if self._possible({**best, name: value}):
                return value
        return None

    def _possible(self, settings: Mapping[str, Any]) -> bool:
        try:
            self._kind.from_mapping(settings)
        except SettingsError:
            return False
        return True

    def _better(self, one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        return other if self._quality(other) > self._quality(one) else one

    def _quality(self, settings: Mapping[str, Any]) -> float:
        key = json.dumps(settings, sort_keys=True)
        if key not in self._known:
            possible = self._possible(settings)
            self._known[key] = self._score(settings) if possible else float("-inf")
            print(f"{self._name} {key}: {self._known[key]:.4f}", file=sys.stderr, flush=True)
        return self._known[key]
