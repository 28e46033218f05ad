"""What is in LoRA files, and where two of them will be in each other's way; no base model is run.

Interference of two LoRAs at a site is read from their factors. ``rows`` and ``columns`` are the
mean squared cosines of the principal angles between the row spaces (what the LoRAs look at) and
between the column spaces (what they write to): 1 if one holds the other, 0 if they are orthogonal
(Björck and Golub 1973). ``conflict`` is the share of output energy that they have in common on
inputs of equal size in all directions, 2·|⟨ΔW_1, ΔW_2⟩| / (‖ΔW_1‖² + ‖ΔW_2‖²): 0 for orthogonal
changes, 1 for equal or opposite ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .lora import Lora, LowRank
from .lora_files.metadata import trigger_words
from .report import block_of


@dataclass(frozen=True)
class LoraFacts:
    """``norms`` are ‖ΔW‖_F by block; ``ranks`` and ``alphas`` count sites; ``sites`` of
    ``base_sites`` that could be changed, by component (``coverage``)."""

    name: str
    base: str
    layouts: Sequence[str]
    kinds: Mapping[str, int]
    dtypes: Mapping[str, int]
    ranks: Mapping[int, int]
    alphas: Mapping[str, int]
    sites: int
    coverage: Mapping[str, tuple[int, int]]
    triggers: Sequence[str]
    norms: Mapping[str, float]
    embeddings: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Interference:
    """Two LoRAs: how many sites they share, and the means over the sites of each block, weighted
    by ‖ΔW_1‖ ‖ΔW_2‖: {block: (rows, columns, conflict)}."""

    first: str
    second: str
    shared: int
    rows: float
    columns: float
    conflict: float
    blocks: Mapping[str, tuple[float, float, float]] = field(
        default_factory=dict[str, tuple[float, float, float]]
    )


def block_norms(lora: Lora) -> dict[str, float]:
    """‖ΔW‖_F of each block."""
    squares: dict[str, float] = {}
    for site, change in lora.sites.items():
        block = block_of(site)
        squares[block] = squares.get(block, 0.0) + change.squared_norm()
    return {block: math.sqrt(max(square, 0.0)) for block, square in squares.items()}


def coverage(lora: Lora) -> dict[str, tuple[int, int]]:
    """Changed sites and all sites of each component of the base."""
    shapes = lora.base.shapes if lora.base is not None else {}
    changed = Counter(site.partition(".")[0] for site in lora.sites)
    total = Counter(site.partition(".")[0] for site in shapes)
    return {component: (count, total[component]) for component, count in changed.items()}


def describe(
    lora: Lora,
    *,
    layouts: Sequence[str] = (),
    kinds: Mapping[str, int] | None = None,
    dtypes: Mapping[str, int] | None = None,
) -> LoraFacts:
    """Facts of a LoRA that was read; the keywords are what only its file knows."""
    scales = {s: lora.scales.get(s, 1.0) * change.rank for s, change in lora.sites.items()}
    return LoraFacts(
        name=lora.name,
        base=lora.base.kind.title if lora.base is not None else "unknown",
        layouts=layouts,
        kinds=kinds or {},
        dtypes=dtypes or {},
        ranks=dict(sorted(Counter(change.rank for change in lora.sites.values()).items())),
        alphas=dict(sorted(Counter(f"{alpha:g}" for alpha in scales.values()).items())),
        sites=len(lora.sites),
        coverage=coverage(lora),
        triggers=trigger_words(lora.metadata),
        norms=block_norms(lora),
        embeddings=list(lora.embeddings),
        notes=list(lora.notes),
    )


def interference(first: Lora, second: Lora) -> Interference:
    """Where two LoRAs are in each other's way."""
    sums: dict[str, list[float]] = {}
    shared = [site for site in first.sites if site in second.sites]
    for site in shared:
        one, two = first.sites[site], second.sites[site]
        if one.shape != two.shape:
            continue
        rows, columns, conflict, weight = site_interference(one, two)
        for block in (block_of(site), ""):
            entry = sums.setdefault(block, [0.0] * 4)
            for index, value in enumerate((rows, columns, conflict, 1.0)):
                entry[index] += weight * value
    means = {
        block: (a / w, b / w, c / w) if w > 0 else (0.0, 0.0, 0.0)
        for block, (a, b, c, w) in sums.items()
    }
    total = means.pop("", (0.0, 0.0, 0.0))
    return Interference(first.name, second.name, len(shared), *total, blocks=means)


def site_interference(one: LowRank, two: LowRank) -> tuple[float, float, float, float]:
    """(rows, columns, conflict, ‖ΔW_1‖ ‖ΔW_2‖) of one site."""
    squares = one.squared_norm(), two.squared_norm()
    if min(squares) <= 0:
        return 0.0, 0.0, 0.0, 0.0
    inner = float(
        ((one.up.double().mT @ two.up.double()) * (one.down.double() @ two.down.double().mT)).sum()
    )
    rows = _alignment(one.down.mT, two.down.mT)
    columns = _alignment(one.up, two.up)
    conflict = 2 * abs(inner) / (squares[0] + squares[1])
    return rows, columns, min(conflict, 1.0), math.sqrt(squares[0] * squares[1])


def _alignment(one: torch.Tensor, two: torch.Tensor) -> float:
    """Mean squared cosine of the principal angles of two column spaces."""
    bases = [_basis(one.double()), _basis(two.double())]
    cosines = torch.linalg.svdvals(bases[0].mT @ bases[1])
    return float((cosines**2).mean()) if cosines.numel() else 0.0


def _basis(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span the same; directions below 1e-7 of the largest do not count."""
    q, r = torch.linalg.qr(matrix)
    u, s, _ = torch.linalg.svd(r)
    return q @ u[:, : int((s > 1e-7 * s[0]).sum())] if s.numel() else q


def to_dict(facts: Sequence[LoraFacts], pairs: Sequence[Interference]) -> dict[str, Any]:
    """For JSON."""
    return {"files": [asdict(f) for f in facts], "interference": [asdict(p) for p in pairs]}
