"""Runs contenders in turn, so that other load on the machine affects all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any


def in_turn(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, *, warm: bool = True
) -> dict[str, list[float]]:
    """Name → seconds of every round; with ``warm``, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(0 if warm else 1, rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: median(some) for name, some in seconds.items()}
