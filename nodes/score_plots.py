"""A figure of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def plot_scores(values: Sequence[float], title: str) -> Any:
    """A bar for each picture and a line at the mean, as a matplotlib Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4, 1 + 0.5 * len(values)), 3), layout="constrained")
    axis = figure.subplots()
    numbers = range(1, len(values) + 1)
    axis.bar(numbers, values)
    mean = sum(values) / len(values)
    axis.axhline(mean, color="black", linestyle="--", label=f"mean {mean:.3f}")
    axis.set_xticks(list(numbers))
    axis.set_xlabel("picture")
    axis.set_ylabel("cosine")
    axis.set_title(title)
    axis.legend()
    return figure
