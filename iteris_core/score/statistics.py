"""Means with standard errors over seeds, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


Rows = Mapping[str, Mapping[str, Stat]]
"""Method → column → value"""


def markdown_table(rows: Rows) -> str:
    """A table with four digits; missing values stay empty."""
    columns = columns_of(rows)
    lines = [["method", *columns], ["---", *("---:" for _ in columns)]]
    lines += [
        [name, *(str(row.get(column, "")) for column in columns)] for name, row in rows.items()
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def columns_of(rows: Rows) -> list[str]:
    """The columns of all rows, in order of appearance."""
    return list(dict.fromkeys(column for row in rows.values() for column in row))
