"""Looks for the rivals' settings on concepts of a world that are not reported."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from rivals import GRIDS, tuned

from .plan import REGIMES, Unit, sets_of, uses_data
from .runs import Runs
from .settings import Chosen

SUBJECTS = 6
"""How many of them a setting is judged by: three pairs, two triples, one set of more."""


class Tuning:
    """``runs`` keeps what was measured, so that a search that was stopped goes on."""

    def __init__(self, runs: Runs, chosen: Chosen, seconds: float = float("inf")) -> None:
        self._runs, self._chosen = runs, chosen
        self._until = time.monotonic() + seconds

    def search(self, methods: Iterable[str] = (), regimes: Iterable[str] = tuple(REGIMES)) -> bool:
        """Find what is not known yet; whether all is known now."""
        names = tuple(methods) or [name for name, grid in GRIDS.items() if grid]
        places = [
            (method, size, regime)
            for size in self._runs.world.sizes
            if size <= len(self._runs.world.subjects)
            for method in names
            for regime in regimes
            if regime == "default" or uses_data(method)
        ]
        for method, size, regime in places:
            if self._chosen.known(method, size, regime):
                continue
            try:
                best = tuned(method, size, self._scorer(regime))
            except _OutOfTime:
                return False
            self._chosen.keep(method, size, regime, best)
        return True

    def _scorer(self, regime: str) -> Any:
        def score(method: str, size: int, settings: Mapping[str, Any]) -> float:
            """The mean of likeness and text alignment on new words."""
            sets = sets_of(self._runs.world.subjects, size, 0)[: max(1, SUBJECTS // size)]
            units = [
                Unit(method, names, settings=settings, calibration=REGIMES[regime])
                for names in sets
            ]
            if not self._runs.run(units, self._until - time.monotonic()):
                raise _OutOfTime
            pictures = [row for unit in units for row in self._runs.known[unit.key]["new words"]]
            return fmean((found["likeness"] + found["text"]) / 2 for _, found in pictures)

        return score


class _OutOfTime(Exception):
    """The time for a search is over."""
