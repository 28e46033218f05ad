"""Matplotlib figures of merges and LoRA files; nothing is displayed on screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from .inspection import Interference, LoraFacts
from .report import MergeReport


def plot_residuals(report: MergeReport) -> Any:
    """Heat maps, block × concept, of the output error for the mean change and after the merge.

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
    return _drawn(_Maps(maps, list(blocks), report.concepts, label))


def plot_loras(facts: Sequence[LoraFacts], pairs: Sequence[Interference]) -> Any:
    """A heat map, block × LoRA, of each block's share of the LoRA's energy; below it heat maps,
    block × pair, of :class:`Interference`, if two LoRAs share a layer. Returns a matplotlib
    Figure."""
    every = list(dict.fromkeys(block for lora in facts for block in lora.blocks))
    shares = [[lora.blocks[b].share if b in lora.blocks else 0.0 for lora in facts] for b in every]
    names, most = [lora.name for lora in facts], max(map(max, shares))
    maps = [_Maps({"energy": shares}, every, names, "share of the LoRA's energy", most)]
    if any(pair.shared for pair in pairs):
        blocks = list(dict.fromkeys(block for pair in pairs for block in pair.rated))
        rated = {
            title: [[pair.rated.get(b, (0.0, 0.0, 0.0))[index] for pair in pairs] for b in blocks]
            for index, title in enumerate(("row spaces", "column spaces", "conflict"))
        }
        names = [f"{pair.first}\n{pair.second}" for pair in pairs]
        maps.append(_Maps(rated, blocks, names, "0: disjoint; 1: identical"))
    return _drawn(*maps)


@dataclass(frozen=True)
class _Maps:
    """Maps of values from 0 to ``most``, each with a title, and one colour bar labelled ``label``;
    ``rows`` are blocks."""

    maps: Mapping[str, Sequence[Sequence[float]]]
    rows: Sequence[str]
    columns: Sequence[str]
    label: str
    most: float = 1.0


def _drawn(*parts: _Maps) -> Any:
    """One figure with the parts stacked, and the maps of each part side by side."""
    from matplotlib.figure import Figure

    widths = [4 + len(part.maps) * max(1.5, 0.5 * len(part.columns)) for part in parts]
    heights = [1.5 + 0.35 * len(part.rows) for part in parts]
    whole = Figure(figsize=(max(widths), sum(heights)), layout="constrained")
    figures = whole.subfigures(len(parts), 1, squeeze=False, height_ratios=heights)
    for part, figure in zip(parts, figures[:, 0], strict=True):
        axes = figure.subplots(1, len(part.maps), sharey=True, squeeze=False)[0]
        image: Any = None
        for axis, (title, values) in zip(axes, part.maps.items(), strict=True):
            image = axis.imshow(values, vmin=0, vmax=part.most, cmap="viridis", aspect="auto")
            axis.set_title(title)
            axis.set_xticks(range(len(part.columns)), part.columns, rotation=45, ha="right")
            axis.set_yticks(range(len(part.rows)), part.rows)
            for y, row in enumerate(values):
                for x, value in enumerate(row):
                    color = "white" if value < 0.6 * part.most else "black"
                    text = f"{value:.2f}"
                    axis.text(x, y, text, ha="center", va="center", color=color, fontsize=8)
        figure.colorbar(image, ax=axes, label=part.label)
    return whole
