"""Means over seeds with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Stat:
    """A mean and its standard error; ``se`` is NaN for a single seed."""

    mean: float
    se: float

    def to_dict(self) -> dict[str, float | None]:
        return {"mean": self.mean, "se": None if math.isnan(self.se) else self.se}

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isnan(self.se) else f"{self.mean:.4f} ± {self.se:.4f}"


def over_seeds(values: Sequence[float], seeds: Sequence[int]) -> Stat:
    """The mean of the seeds' means, and the standard error of that mean.

    Images with the same seed share their noise, so seeds are independent, but images are not.
    """
    groups: dict[int, list[float]] = {}
    for value, seed in zip(values, seeds, strict=True):
        groups.setdefault(seed, []).append(value)
    means = [fmean(group) for group in groups.values()]
    error = stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Stat(fmean(means), error)
