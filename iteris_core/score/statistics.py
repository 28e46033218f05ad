"""Means with standard errors over seeds, and tables of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, stdev


@dataclass(frozen=True)
class Stat:
    """A mean and its standard error; ``se`` is NaN where there is only one seed."""

    mean: float
    se: float

    def to_dict(self) -> dict[str, float | None]:
        return {"mean": self.mean, "se": None if math.isnan(self.se) else self.se}

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isnan(self.se) else f"{self.mean:.4f} ± {self.se:.4f}"


def over_seeds(values: Sequence[float], seeds: Sequence[int]) -> Stat:
    """The mean of the seeds' means, and the standard error of that mean.

    Pictures of one seed share their noise, so that seeds, not pictures, are what is independent.
    """
    groups: dict[int, list[float]] = {}
    for value, seed in zip(values, seeds, strict=True):
        groups.setdefault(seed, []).append(value)
    means = [fmean(group) for group in groups.values()]
    error = stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Stat(fmean(means), error)


def over_compositions(values: Sequence[float]) -> Stat:
    """The mean over compositions, which share no merge, and its standard error."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Stat(fmean(values), error)


Rows = Mapping[str, Mapping[str, Stat]]
"""method → column → value"""


def markdown_table(rows: Rows) -> str:
    """A table of four digits; a column that a row lacks stays empty."""
    columns = columns_of(rows)
    lines = [f"| method | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, row in rows.items():
        cells = [str(row[column]) if column in row else "" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def csv_table(rows: Rows) -> str:
    columns = columns_of(rows)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["method", *(f"{c} {part}" for c in columns for part in ("mean", "se"))])
    for name, row in rows.items():
        cells = [(row[c].mean, row[c].se) if c in row else ("", "") for c in columns]
        writer.writerow([name, *chain.from_iterable(cells)])
    return text.getvalue()


def columns_of(rows: Rows) -> list[str]:
    """The columns of all rows, in the order in which they come."""
    return list(dict.fromkeys(column for row in rows.values() for column in row))
