"""How much LoRAs get into each other's way, from their weights alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from ..iteris_core.concepts import Concept
from ..iteris_core.errors import IterisError
from ..iteris_core.lora import Lora, LowRank
from ..iteris_core.report.report import block_of


@dataclass(frozen=True)
class Interference:
    """``blocks``: block → pair of names → overlap from 0 to 1; ``rows``: name, sites, ranks and
    norm of each LoRA."""

    blocks: Mapping[str, Mapping[tuple[str, str], float]]
    rows: Sequence[tuple[str, int, str, float]]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys(pair for block in self.blocks.values() for pair in block))

    def table(self) -> str:
        lines = [f"{'LoRA':24} {'sites':>6} {'rank':>8} {'size':>8}"]
        lines += [f"{n:24} {sites:6} {ranks:>8} {norm:8.2f}" for n, sites, ranks, norm in self.rows]
        for pair in self.pairs:
            shared = {b: found[pair] for b, found in self.blocks.items() if pair in found}
            worst = max(shared, key=lambda block: shared[block])
            mean = sum(shared.values()) / len(shared)
            lines.append(
                f"{pair[0]} and {pair[1]}: overlap {mean:.0%}, "
                f"most in {worst} ({shared[worst]:.0%})"
            )
        return "\n".join(lines)


def interference(concepts: Sequence[Concept]) -> Interference:
    """The overlap of two LoRAs at a site is the share of either's energy that lies in the row
    space of the other, the mean of both: inputs that move one move the other too."""
    named = _numbered([(c.name, c.lora) for c in concepts if c.lora is not None])
    if len(named) < 2:
        raise IterisError("Inspect LoRAs compares LoRAs: connect two concepts or more.")
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for (name, lora), (other_name, other) in combinations(named, 2):
        for site in lora.sites:
            if site in other.sites:
                block = found.setdefault(block_of(site), {})
                block.setdefault((name, other_name), []).append(
                    _overlap(lora.sites[site], other.sites[site])
                )
    if not found:
        raise IterisError("The LoRAs change no site in common; they cannot interfere.")
    blocks = {
        block: {pair: sum(some) / len(some) for pair, some in pairs.items()}
        for block, pairs in found.items()
    }
    rows = [
        (
            name,
            len(lora.sites),
            "/".join(map(str, sorted(lora.ranks))),
            sum(change.squared_norm() for change in lora.sites.values()) ** 0.5,
        )
        for name, lora in named
    ]
    return Interference(blocks, rows)


def _numbered(named: Sequence[tuple[str, Lora]]) -> list[tuple[str, Lora]]:
    """A name that is taken gets a number: "sks", "sks (2)"."""
    names = [name for name, _ in named]
    return [
        (f"{name} ({names[: index + 1].count(name)})" if name in names[:index] else name, lora)
        for index, (name, lora) in enumerate(named)
    ]


def _overlap(one: LowRank, other: LowRank) -> float:
    shares: list[float] = []
    for a, b in ((one, other), (other, one)):
        basis = torch.linalg.qr(b.down.double().mT).Q
        projected = LowRank(a.up.double(), a.down.double() @ basis)
        whole = a.squared_norm()
        shares.append(projected.squared_norm() / whole if whole > 0 else 0.0)
    return sum(shares) / 2


def plot_interference(found: Interference) -> Any:
    """A heat map, block × pair, as a matplotlib Figure."""
    from matplotlib.figure import Figure

    pairs, blocks = found.pairs, list(found.blocks)
    figure = Figure(figsize=(4 + 1.2 * len(pairs), 1.5 + 0.35 * len(blocks)), layout="constrained")
    axis = figure.subplots()
    values = [[found.blocks[block].get(pair, 0.0) for pair in pairs] for block in blocks]
    image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(pairs)), [f"{a}\n{b}" for a, b in pairs])
    axis.set_yticks(range(len(blocks)), blocks)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            color = "white" if value < 0.6 else "black"
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axis, label="overlap of the LoRAs' row spaces")
    return figure
