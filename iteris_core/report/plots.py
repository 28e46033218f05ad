"""Figures of a merge report, with matplotlib; nothing is shown on a screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import IterisError
from .inspection import Interference
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


def plot_interference(names: Sequence[str], pairs: Sequence[Interference]) -> Any:
    """Predicted conflict, block × pair, and file × file over all blocks, as a matplotlib Figure."""
    from matplotlib.figure import Figure

    if not pairs:
        raise IterisError("Interference needs two LoRA files; there is nothing to plot for one.")
    blocks = list(dict.fromkeys(block for pair in pairs for block in pair.blocks))
    values = [[pair.blocks.get(block, (0.0, 0.0, 0.0))[2] for pair in pairs] for block in blocks]
    size = (5 + 1.2 * (len(pairs) + len(names)), 2.5 + 0.3 * max(len(blocks), len(names)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, 2)
    image = axes[0].imshow(values or [[0.0]], vmin=0, vmax=1, cmap="magma", aspect="auto")
    axes[0].set_title("conflict by block")
    labels = [f"{pair.first}\n{pair.second}" for pair in pairs]
    axes[0].set_xticks(range(len(pairs)), labels, rotation=45, ha="right")
    axes[0].set_yticks(range(len(blocks)), blocks)
    square = [[0.0] * len(names) for _ in names]
    order = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    for (i, j), pair in zip(order, pairs, strict=True):
        square[i][j] = square[j][i] = pair.conflict
    for i in range(len(names)):
        square[i][i] = 1.0
    axes[1].imshow(square, vmin=0, vmax=1, cmap="magma")
    axes[1].set_title("conflict of the whole files")
    axes[1].set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes[1].set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=axes, label="share of the output energy that is common")
    return figure
