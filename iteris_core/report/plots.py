"""Figures of merges and of LoRA files, with matplotlib; nothing is shown on a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError
from .inspection import Interference
from .report import MergeReport


def plot_residuals(report: MergeReport) -> Any:
    """Heat maps, block × concept, of the output error with the mean change and after the merge.

    Returns a matplotlib Figure; save it with ``savefig``.
    """
    blocks = report.blocks()
    if not blocks:
        raise UsageError(f"Method {report.method!r} measures no output errors; nothing to plot.")
    maps = {
        title: [[pair[part] for pair in row] for row in blocks.values()]
        for part, title in enumerate(("mean of the LoRAs", "merged"))
    }
    label = "output error, relative to the LoRA's change"
    return _heat_maps(maps, list(blocks), report.concepts, label)


def plot_interference(pairs: Sequence[Interference]) -> Any:
    """Heat maps, block × pair, of what :class:`Interference` holds, as a matplotlib Figure."""
    if not pairs:
        raise UsageError("Interference needs two LoRA files; there is nothing to plot for one.")
    blocks = list(dict.fromkeys(block for pair in pairs for block in pair.rated))
    maps = {
        title: [[pair.rated.get(b, (0.0, 0.0, 0.0))[index] for pair in pairs] for b in blocks]
        for index, title in enumerate(("row spaces", "column spaces", "conflict"))
    }
    names = [f"{pair.first}\n{pair.second}" for pair in pairs]
    return _heat_maps(maps, blocks, names, "0: out of each other's way; 1: the same")


def _heat_maps(
    maps: Mapping[str, Sequence[Sequence[float]]],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
) -> Any:
    """Maps of values from 0 to 1 side by side, each under its title, with one colour bar."""
    from matplotlib.figure import Figure

    size = (4 + len(maps) * max(1.5, 0.5 * len(columns)), 1.5 + 0.35 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(maps), sharey=True)
    image: Any = None
    for axis, (title, values) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(title)
        axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axis.set_yticks(range(len(rows)), rows)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                color = "white" if value < 0.6 else "black"
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes, label=label)
    return figure
