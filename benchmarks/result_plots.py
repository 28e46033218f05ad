"""The plots of ``docs/results.md`` as SVG, each with a digest of its figures.

Text stays text, and nothing in the files depends on when they are made; the digest, in their
metadata, tells whether a plot is that of today's figures without drawing it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLORS = {
    "iteris": "#c2410c",
    "regmean++": "#1d4ed8",
    "regmean": "#60a5fa",
    "ssr": "#15803d",
    "average": "#a3a3a3",
    "sum": "#525252",
    "chain-of-merges": "#7c3aed",
}
OTHERS = ("#0891b2", "#be185d", "#854d0e", "#4d7c0f", "#334155")
INTERVAL = 1.96
"""Standard errors on either side: 95 % of a normal distribution."""

Value = Mapping[str, Any]
"""``mean``, and the ends of its ``interval``"""


@dataclass(frozen=True)
class Plot:
    """``figures`` are all numbers in it; ``draw`` puts them onto axes."""

    name: str
    figures: Any
    draw: Callable[[Any, Any], None]
    size: tuple[float, float] = (9, 3.6)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.figures, sort_keys=True).encode()).hexdigest()

    def is_at(self, folder: Path) -> bool:
        """Whether the plot of these figures is there."""
        path = folder / self.name
        return path.is_file() and self.digest in path.read_text(encoding="utf-8")

    def save(self, folder: Path) -> None:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure.subplots(), self.figures)
            metadata = {"Date": None, "Description": f"sha256 of the figures: {self.digest}"}
            figure.savefig(folder / self.name, metadata=metadata)


def bars(
    name: str,
    groups: Mapping[str, Mapping[str, Value]],
    column: str,
    lines: Mapping[str, str],
    by: str = "concepts",
) -> Plot:
    """A group of bars a count of concepts with intervals; ``lines`` are rows drawn across their
    group, by what they are called. ``groups``: concepts, or what ``by`` says, → method → value."""
    figures = {"groups": groups, "column": column, "lines": lines}
    return Plot(name, figures if by == "concepts" else {**figures, "by": by}, _draw_bars)


def _draw_bars(axes: Any, figures: Mapping[str, Any]) -> None:
    groups, across = figures["groups"], figures["lines"]
    methods = list(dict.fromkeys(m for rows in groups.values() for m in rows if m not in across))
    width = 0.84 / len(methods)
    for number, method in enumerate(methods):
        places = [i for i, rows in enumerate(groups.values()) if method in rows]
        some = [rows[method] for rows in groups.values() if method in rows]
        axes.bar(
            [place - 0.42 + (number + 0.5) * width for place in places],
            [value["mean"] for value in some],
            width,
            yerr=[
                [value["mean"] - value["interval"][0] for value in some],
                [value["interval"][1] - value["mean"] for value in some],
            ],
            label=method,
            color=COLORS.get(method, OTHERS[number % len(OTHERS)]),
            error_kw={"elinewidth": 0.8, "capsize": 1.5},
        )
    for style, (row, label) in zip(("-", ":"), across.items(), strict=False):
        for place, rows in enumerate(groups.values()):
            if row in rows:
                ends = [place - 0.45, place + 0.45]
                mean = [rows[row]["mean"]] * 2
                axes.plot(ends, mean, style, color="black", label=label if not place else None)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_xlabel(figures.get("by", "concepts"))
    axes.set_ylabel(figures["column"])
    axes.axhline(0, color="black", linewidth=0.6)
    _finish(axes)


def curves(
    name: str,
    series: Mapping[str, Mapping[str, float]],
    labels: tuple[str, str],
    *,
    logarithmic: bool = False,
) -> Plot:
    """``series``: name → x → y"""
    figures = {"series": series, "labels": labels, "logarithmic": logarithmic}
    return Plot(name, figures, _draw_curves, (9, 3.2))


def _draw_curves(axes: Any, figures: Mapping[str, Any]) -> None:
    for number, (name, points) in enumerate(figures["series"].items()):
        x = [float(value) for value in points]
        color = (*COLORS.values(), *OTHERS)[number]
        axes.plot(x, list(points.values()), marker=".", label=name, color=color)
    if figures["logarithmic"]:
        axes.set_yscale("log")
    axes.set_xlabel(figures["labels"][0])
    axes.set_ylabel(figures["labels"][1])
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9
    )


def renew(plots: Sequence[Plot], folder: Path, *, write: bool) -> list[str]:
    """The names of those that were not there as they should be."""
    stale = [plot for plot in plots if not plot.is_at(folder)]
    for plot in stale if write else ():
        plot.save(folder)
    return [plot.name for plot in stale]
