"""Figures of a merge report, with matplotlib; nothing is shown on a screen."""

from __future__ import annotations

from typing import Any

from .errors import IterisError
from .report import MergeReport


def plot_residuals(report: MergeReport) -> Any:
    """A heat map, block × concept, of the output error with the mean change and after the merge.

    Returns a matplotlib Figure; save it with ``savefig``.
    """
    from matplotlib.figure import Figure

    blocks = report.blocks()
    if not blocks:
        raise IterisError(f"Method {report.method!r} measures no output errors; nothing to plot.")
    size = (4 + 1.2 * 2 * len(report.concepts), 1.5 + 0.35 * len(blocks))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    image: Any = None
    for axis, title, part in zip(axes, ("mean of the LoRAs", "merged"), (0, 1), strict=True):
        values = [[pair[part] for pair in row] for row in blocks.values()]
        image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(title)
        axis.set_xticks(range(len(report.concepts)), report.concepts, rotation=45, ha="right")
        axis.set_yticks(range(len(blocks)), list(blocks))
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                color = "white" if value < 0.6 else "black"
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes, label="output error, relative to the LoRA's change")
    return figure


def plot_convergence(report: MergeReport) -> Any:
    """The largest relative change of a site in each Jacobi iteration, as a matplotlib Figure."""
    from matplotlib.figure import Figure

    if not report.convergence:
        raise IterisError('There is no iteration to plot: merge with schedule="jacobi".')
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    iterations = range(2, len(report.convergence) + 2)
    axis.semilogy(iterations, [max(v, 1e-12) for v in report.convergence], marker="o")
    axis.set_xlabel("iteration")
    axis.set_ylabel("largest relative change of a site")
    axis.grid(visible=True, alpha=0.3)
    return figure
