"""Contenders in turn, so that what else the machine does hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any


def in_turn(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, *, warm: bool = True
) -> dict[str, list[float]]:
    """name → seconds of every round, after one that does not count if ``warm`` is asked for."""
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
