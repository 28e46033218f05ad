"""WUDI-Merging (Cheng et al., ICML 2025, arXiv 2503.08099): a change that disturbs none of them.

The rows of ΔW_i are taken for the inputs of LoRA i, and the merged change D minimises

    Σ ‖(D − ΔW_i) ΔW_iᵀ‖² / ‖ΔW_i‖²

by Adam from the sum. With P_i = down_iᵀ R_iᵀ / ‖ΔW_i‖, up_i = Q_i R_i, that is ‖D P − T‖² for
P = [P_1 … P_N] and T = [ΔW_1 P_1 … ΔW_N P_N]. Within the LoRAs' row spaces the minimum is unique
and has a closed form, D = T P⁺; outside of them the loss is flat, and what Adam's steps leave there
stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from iteris_core.linalg import cut_dense
from iteris_core.lora import LowRank, concatenate
from iteris_core.methods.registry import AtSite, on_weights, rank_setting
from iteris_core.settings import Settings, setting


@dataclass(frozen=True)
class WudiSettings(Settings):
    solution: Literal["adam", "closed"] = setting(
        "adam",
        "adam is the paper's: some steps from the sum. closed is the minimum that they go to.",
    )
    steps: int = setting(300, "Steps of Adam; 300 in the paper.", low=1)
    rate: float = setting(
        1e-5,
        "Learning rate of Adam; 1e-5 in the paper. No entry moves by more than about steps × rate.",
        above=0,
    )
    scale: float = setting(1.0, "What the merged change is multiplied by.")
    rank: int | float | None = rank_setting()


@on_weights("wudi", WudiSettings)
def wudi(at: AtSite, settings: WudiSettings) -> tuple[LowRank, float]:
    """The change that disturbs no LoRA along its own rows, by Adam (WUDI, ICML 2025)."""
    changes = [change.to(torch.float64) for change in at.weighted()]
    rows, targets = _problem(changes)
    if settings.solution == "closed":
        merged = targets @ torch.linalg.pinv(rows)
    else:
        merged = _descended(concatenate(changes).dense(), rows, targets, settings)
    return cut_dense(at.changes, settings.scale * merged, settings.rank)


def _problem(changes: list[LowRank]) -> tuple[Tensor, Tensor]:
    """P, (in, Σ r_i), and T, (out, Σ r_i)."""
    rows: list[Tensor] = []
    targets: list[Tensor] = []
    for change in changes:
        triangle = torch.linalg.qr(change.up).R
        norm = max(change.squared_norm(), torch.finfo(torch.float64).tiny) ** 0.5
        rows.append(change.down.mT @ triangle.mT / norm)
        targets.append(change.up @ (change.down @ rows[-1]))
    return torch.cat(rows, dim=1), torch.cat(targets, dim=1)


def _descended(start: Tensor, rows: Tensor, targets: Tensor, settings: WudiSettings) -> Tensor:
    merged = start.clone()
    adam = torch.optim.Adam([merged], lr=settings.rate)
    for _ in range(settings.steps):
        merged.grad = 2 * (merged @ rows - targets) @ rows.mT
        adam.step()
    return merged
