"""The matplotlib figure of LoRA files; nothing is displayed on screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .inspection import LoraFacts


def plot_loras(facts: Sequence[LoraFacts]) -> Any:
    """A heat map, block × LoRA, of each block's share of the LoRA's energy.

    Returns a matplotlib Figure; save it with ``savefig``.
    """
    from matplotlib.figure import Figure

    blocks = list(dict.fromkeys(block for lora in facts for block in lora.blocks))
    shares = [[lora.blocks[b].share if b in lora.blocks else 0.0 for lora in facts] for b in blocks]
    most = max(map(max, shares))
    size = 4 + max(1.5, 0.5 * len(facts)), 1.5 + 0.35 * len(blocks)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, vmin=0, vmax=most, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(facts)), [lora.name for lora in facts], rotation=45, ha="right")
    axis.set_yticks(range(len(blocks)), blocks)
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            color = "white" if share < 0.6 * most else "black"
            axis.text(x, y, f"{share:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, label="share of the LoRA's energy")
    return figure
