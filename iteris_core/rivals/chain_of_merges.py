"""Chain of Merges (Buzzega et al., 2025, arXiv 2508.21421): layer after layer, inputs made anew.

Each layer is fitted to what every LoRA's own model gives there, on inputs that passed the layers
merged already: min Σ ‖X̃_i (W0 + ΔW)ᵀ − X_i (W0 + ΔW_i)ᵀ‖², every token alike. That is the sweep of
``iteris`` without its weighting, choice of tokens and repair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..lora import SiteChanges
from ..methods.registry import micro_batch_setting, on_activations, rank_setting
from ..passes.job import Job
from ..settings import Settings, setting
from ..solve.output import OutputMoments
from ..solve.problem import Bytes, RegressionSpec, SiteContext


@dataclass(frozen=True)
class ChainOfMergesSettings(Settings):
    ridge: float = setting(
        1e-6,
        "How strongly a layer is drawn toward the LoRAs, so that layers with few tokens have a "
        "solution.",
        low=0,
        below=1,
    )
    shrink: float = setting(
        1.0,
        "What off-diagonal entries of the moments are multiplied by, as in RegMean; 1 is plain "
        "least squares.",
        above=0,
        high=1,
    )
    rank: int | float | None = rank_setting()
    micro_batch: int = micro_batch_setting()


class _WholeOutputs(OutputMoments):
    """Moments of the inputs and of the whole outputs, every token alike."""

    def __init__(self, opening: SiteContext) -> None:
        super().__init__(opening, "none", torch.float32)

    @staticmethod
    def bytes(changes: SiteChanges) -> Bytes:  # type: ignore[override]
        return OutputMoments.bytes(changes, torch.float32.itemsize, None, torch.float64)


@on_activations("chain-of-merges", ChainOfMergesSettings, _WholeOutputs, merged_inputs=True)
def chain_of_merges(job: Job, settings: ChainOfMergesSettings) -> RegressionSpec:
    """Layer after layer, each to the LoRAs' own outputs, inputs made anew (CoM, 2025)."""
    return RegressionSpec(
        job.weights, settings.ridge, "none", shrink=settings.shrink, rank=settings.rank
    )
