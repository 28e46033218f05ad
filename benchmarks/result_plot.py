"""A plot of means with intervals as SVG, with a digest of its figures.

Text stays text, and the file does not depend on its date. The digest in its metadata shows whether
a plot matches today's figures, without redrawing it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

Series = tuple[str, Sequence[tuple[float, float, float, float]]]
"""A label, and (x, mean, lower end, upper end) of each point"""

COLORS = ("#c2410c", "#7c3aed", "#1d4ed8", "#737373", "#171717")


@dataclass(frozen=True)
class Plot:
    """``ticks`` are positions on the x axis with labels; values below ``floor`` are cut off."""

    series: Sequence[Series]
    ticks: Sequence[tuple[float, str]]
    labels: tuple[str, str]
    floor: float

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def is_at(self, path: Path) -> bool:
        """Whether the plot of these figures exists."""
        return path.is_file() and self.digest in path.read_text(encoding="utf-8")

    def save(self, path: Path) -> None:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
            figure = Figure(figsize=(9, 3.6), layout="constrained")
            self._draw(figure.subplots())
            metadata = {"Date": None, "Description": f"sha256 of the figures: {self.digest}"}
            figure.savefig(path, metadata=metadata)

    def _draw(self, axes: Any) -> None:
        gap = min(two - one for (one, _), (two, _) in pairwise(self.ticks))
        for number, (label, points) in enumerate(self.series):
            x, mean, low, high = zip(*points, strict=True)
            shift = 0.07 * gap * (number - (len(self.series) - 1) / 2)
            axes.errorbar(
                [value + shift for value in x],
                mean,
                yerr=[
                    [m - end for m, end in zip(mean, low, strict=True)],
                    [end - m for m, end in zip(mean, high, strict=True)],
                ],
                label=label,
                color=COLORS[number],
                marker="o",
                markersize=4,
                linewidth=2.4 if not number else 1.4,
                elinewidth=0.9,
                capsize=2,
            )
        axes.set_xticks([at for at, _ in self.ticks], [text for _, text in self.ticks])
        axes.set_ylim(self.floor, 1.1)
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.axhline(0, color="black", linewidth=0.6)
        axes.axhline(1, color="black", linewidth=0.6, linestyle=":")
        axes.set_xlabel(self.labels[0])
        axes.set_ylabel(self.labels[1])
        axes.spines[["top", "right"]].set_visible(False)
        axes.figure.legend(
            *axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9
        )
