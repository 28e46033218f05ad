"""DELLA (Deep et al., 2024, arXiv 2406.11617): drop entries by their magnitude, rescale, merge.

In each row of ΔW_i the entries are ranked by magnitude; the smallest stays with a chance of
density − window / 2, the largest with density + window / 2, the others evenly between, and what
stays is divided by its chance. Then signs are elected as in TIES, or everything is added up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iteris_core.errors import SettingsError
from iteris_core.linalg import cut_dense
from iteris_core.lora import LowRank
from iteris_core.methods.elected_signs import disjoint_mean
from iteris_core.methods.registry import AtSite, on_weights, rank_setting
from iteris_core.settings import Settings, setting


@dataclass(frozen=True)
class DellaSettings(Settings):
    density: float = setting(
        0.7, "Mean chance of an entry to stay; 0.7 in the paper's example.", above=0, high=1
    )
    window: float = setting(
        0.14,
        "How much likelier a row's largest entry is to stay than its smallest; 0 is DARE.",
        low=0,
        below=1,
    )
    scale: float = setting(
        1.1, "What the merged change is multiplied by (λ); 1.1 in the paper's example."
    )
    rank: int | float | None = rank_setting()

    def __post_init__(self) -> None:
        super().__post_init__()
        least, most = self.density - self.window / 2, self.density + self.window / 2
        if least <= 0 or most > 1:
            raise SettingsError(
                f"density {self.density:g} and window {self.window:g} give chances from "
                f"{least:g} to {most:g}, which must lie above 0 and not above 1; make the window "
                "narrower."
            )


@dataclass(frozen=True)
class DellaLinearSettings(DellaSettings):
    scale: float = setting(1.0, "What the merged change is multiplied by; 1 for the plain sum.")


@on_weights("della", DellaSettings)
def della(at: AtSite, settings: DellaSettings) -> tuple[LowRank, float]:
    """Drop entries by magnitude, rescale, then elect signs as TIES does (DELLA, 2024)."""
    sampled = torch.stack([_sampled(change, at, settings) for change in at.dense()])
    return cut_dense(at.changes, settings.scale * disjoint_mean(sampled), settings.rank)


@on_weights("della-linear", DellaLinearSettings)
def della_linear(at: AtSite, settings: DellaSettings) -> tuple[LowRank, float]:
    """Drop entries by magnitude, rescale, add up (DELLA without its election, 2024)."""
    total = sum(_sampled(change, at, settings) for change in at.dense())
    return cut_dense(at.changes, settings.scale * torch.as_tensor(total), settings.rank)


def _sampled(change: Tensor, at: AtSite, settings: DellaSettings) -> Tensor:
    """(out, in): each entry is zero, or what it was over its chance to stay."""
    width = change.shape[1]
    ranks = change.abs().argsort(dim=1).argsort(dim=1).to(change)  # 0 for the smallest of a row
    share = ranks / max(width - 1, 1) - 0.5
    chance = settings.density + settings.window * share
    drawn = torch.rand(change.shape, generator=at.generator, dtype=torch.float64)
    return torch.where(drawn.to(change.device) < chance, change / chance, 0.0)
