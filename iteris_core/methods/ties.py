"""TIES-Merging (Yadav et al., NeurIPS 2023, arXiv 2306.01708): trim, elect sign, disjoint merge.

A LoRA is trimmed over all of its sites together, as in the authors' code: a layer that it changes
little is left to the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.lowrank import cut_dense
from ..lora import LowRank
from ..settings import Settings, setting
from .registry import AtSite, on_weights, rank_setting


@dataclass(frozen=True)
class TiesSettings(Settings):
    density: float = setting(
        0.2, "Share of each LoRA's entries to keep; 0.2 in the paper.", above=0, high=1
    )
    scale: float = setting(1.0, "Factor on the merged change (λ).")
    rank: int | float | None = rank_setting()


@on_weights("ties", TiesSettings, trims=AtSite.dense)
def ties(at: AtSite, settings: TiesSettings) -> tuple[LowRank, float]:
    """Trim small entries, elect a sign per entry, average what agrees (NeurIPS 2023)."""
    merged = disjoint_mean(at.trimmed(at.dense()))
    return cut_dense(at.changes, settings.scale * merged, settings.rank)


def elect_signs(changes: Tensor) -> Tensor:
    """The sign of the sum over (concepts, …) per entry; if that is zero, the sign of the total."""
    total = changes.sum(dim=0)
    majority = total.sum().sign()
    return torch.where(total == 0, majority, total.sign())


def disjoint_mean(changes: Tensor) -> Tensor:
    """Mean over (concepts, …) of the entries that have the elected sign."""
    agree = (changes.sign() == elect_signs(changes)) & (changes != 0)
    return (changes * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
