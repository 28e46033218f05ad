"""Facts about LoRA files, and the interference of two of them; no base model runs.

Interference of two LoRAs at a site is computed from their factors. ``rows`` and ``columns`` are the
mean squared cosines of the principal angles between the row spaces (the inputs that the LoRAs read)
and between the column spaces (the outputs that they write): 1 if one contains the other, 0 if they
are orthogonal (Björck and Golub 1973). ``conflict`` is the share of output energy that they have in
common on isotropic inputs, 2·|⟨ΔW_1, ΔW_2⟩| / (‖ΔW_1‖² + ‖ΔW_2‖²): 0 for orthogonal changes, 1 for
equal or opposite ones.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lora import Lora, LowRank
from ..lora_files.blocks import LISTS, blocks_of
from ..lora_files.metadata import trigger_words
from ..lora_files.tensors import dtypes_of, kinds_of


@dataclass(frozen=True)
class BlockFacts:
    """Changed ``layers``, their total ‖ΔW‖_F, and its square's ``share`` of the whole LoRA's."""

    layers: int
    norm: float
    share: float


@dataclass(frozen=True)
class LoraFacts:
    """``blocks`` holds each block's facts; ``ranks`` and ``alphas`` count sites. ``coverage`` gives
    changed and changeable sites by component. ``embeddings`` are names with the number of vectors
    per text encoder. ``kinds`` and ``dtypes`` count entries in the file."""

    name: str
    base: str
    ranks: Mapping[int, int]
    alphas: Mapping[str, int]
    sites: int
    coverage: Mapping[str, tuple[int, int]]
    triggers: Sequence[str]
    blocks: Mapping[str, BlockFacts]
    embeddings: Sequence[str]
    notes: Sequence[str]
    kinds: Mapping[str, int]
    dtypes: Mapping[str, int]


@dataclass(frozen=True)
class Interference:
    """Two LoRAs: how many sites they share, and the means over these, weighted by ‖ΔW_1‖
    ‖ΔW_2‖."""

    first: str
    second: str
    shared: int
    rows: float
    columns: float
    conflict: float


def block_facts(lora: Lora) -> dict[str, BlockFacts]:
    """The facts of each block, named as in block weights where possible."""
    names = blocks_of(lora.base) if lora.base is not None else {}
    squares: dict[str, list[float]] = defaultdict(list)
    for site, change in lora.sites.items():
        squares[names.get(site) or block_of(site)].append(max(change.squared_norm(), 0.0))
    total = sum(map(sum, squares.values())) or 1.0
    listed = (*LISTS[26], *LISTS[61])  # in the order of weight lists, then others in their own
    order = [block for block in listed if block in squares]
    return {
        block: BlockFacts(len(some := squares[block]), math.sqrt(sum(some)), sum(some) / total)
        for block in dict.fromkeys([*order, *squares])
    }


def block_of(site: str) -> str:
    """``up_blocks.1`` for a UNet site, ``text_encoder.layers.3`` for a text encoder's; for a
    transformers model the whole path, which distinguishes encoder and decoder."""
    component, *parts = site.split(".")
    prefix = [] if component in ("unet", "transformer") else [component]
    for index, part in enumerate(parts):
        if part.isdigit() and component == "model":
            return ".".join(parts[: index + 1])
        if part.isdigit():
            return ".".join([*prefix, *parts[max(0, index - 1) : index + 1]])
        if part == "mid_block":
            return part
    return ".".join([*prefix, *parts[:-1]]) or site


def describe(lora: Lora, tensors: Mapping[str, Tensor] | None = None) -> LoraFacts:
    """Facts about a LoRA, and about its file's ``tensors``."""
    tensors = tensors or {}
    alphas = Counter(f"{change.alpha:g}" for change in lora.sites.values())
    changed = Counter(site.partition(".")[0] for site in lora.sites)
    shapes = lora.base.shapes if lora.base is not None else {}
    total = Counter(site.partition(".")[0] for site in shapes)
    return LoraFacts(
        name=lora.name,
        base=lora.base.architecture.title if lora.base is not None else "unknown",
        ranks=dict(sorted(Counter(change.rank for change in lora.sites.values()).items())),
        alphas=dict(sorted(alphas.items())),
        sites=len(lora.sites),
        coverage={component: (count, total[component]) for component, count in changed.items()},
        triggers=trigger_words(lora.metadata),
        blocks=block_facts(lora),
        embeddings=[
            f"{name} ({', '.join(f'{len(v)} × {part}' for part, v in parts.items())})"
            for name, parts in lora.embeddings.items()
        ],
        notes=list(lora.notes),
        kinds=kinds_of(tensors),
        dtypes=dtypes_of(tensors),
    )


def interference(first: Lora, second: Lora) -> Interference:
    """The interference of two LoRAs at the sites that they share."""
    total = torch.zeros(4, dtype=torch.float64)
    shared = [site for site in first.sites if site in second.sites]
    for site in shared:
        one, two = first.sites[site], second.sites[site]
        if one.shape == two.shape:
            *figures, weight = site_interference(one, two)
            total += weight * torch.tensor([*figures, 1.0], dtype=torch.float64)
    # If nothing has any weight, every figure is zero.
    rows, columns, conflict = (total[:3] / total[3].clamp(min=1e-300)).tolist()
    return Interference(first.name, second.name, len(shared), rows, columns, conflict)


def site_interference(one: LowRank, two: LowRank) -> tuple[float, float, float, float]:
    """(rows, columns, conflict, ‖ΔW_1‖ ‖ΔW_2‖) for one site, from rank × rank products."""
    up, other_up = one.up.double(), two.up.double()
    down, other_down = one.down.double().mT, two.down.double().mT
    writes = up.mT @ up, up.mT @ other_up, other_up.mT @ other_up
    looks = down.mT @ down, down.mT @ other_down, other_down.mT @ other_down
    first, inner, second = (float((a * b).sum()) for a, b in zip(writes, looks, strict=True))
    if min(first, second) <= 0:
        return 0.0, 0.0, 0.0, 0.0
    conflict = 2 * abs(inner) / (first + second)
    return _alignment(*looks), _alignment(*writes), min(conflict, 1.0), math.sqrt(first * second)


def _alignment(one: Tensor, cross: Tensor, two: Tensor) -> float:
    """Mean squared cosine of the principal angles of two column spaces, from AᵀA, AᵀB and BᵀB:
    ‖(AᵀA)^-½ AᵀB (BᵀB)^-½‖²_F over the smaller rank."""
    left, right = _whitening(one), _whitening(two)
    count = min(left.shape[1], right.shape[1])
    return min(float((left.mT @ cross @ right).square().sum()) / count, 1.0)


def _whitening(gram: Tensor) -> Tensor:
    """W with Wᵀ ``gram`` W = 1; directions below 1e-6 of the largest do not count."""
    squares, vectors = torch.linalg.eigh(gram)
    kept = squares > 1e-12 * squares[-1]
    return vectors[:, kept] / squares[kept].sqrt()
