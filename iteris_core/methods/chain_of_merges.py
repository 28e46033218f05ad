"""Chain of Merges (Buzzega et al., 2025, arXiv 2508.21421): least squares on whole outputs.

Each layer is fitted to its output in every LoRA's own model, on inputs that passed through already
merged layers: min Σ ‖X̃_i (W0 + ΔW)ᵀ − X_i (W0 + ΔW_i)ᵀ‖², with equal tokens. That is the sweep of
``iteris`` without its weighting, choice of tokens and repair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..lora import SiteChanges
from ..passes.job import Job
from ..settings import Settings, setting
from ..solve.moments import OutputMoments
from ..solve.problem import MemoryEstimate, RegressionSpec, SiteContext
from .registry import micro_batch_setting, on_activations, rank_setting


@dataclass(frozen=True)
class ChainOfMergesSettings(Settings):
    ridge: float = setting(
        1e-6,
        "How strongly a layer is pulled toward the LoRAs, so that layers with few tokens have a "
        "solution.",
        low=0,
        below=1,
    )
    shrink: float = setting(
        1.0,
        "Factor on off-diagonal entries of the moments, as in RegMean; 1 is plain least squares.",
        above=0,
        high=1,
    )
    rank: int | float | None = rank_setting()
    micro_batch: int = micro_batch_setting()


class _WholeOutputs(OutputMoments):
    """Moments of the inputs and of the whole outputs, with equal tokens."""

    def __init__(self, context: SiteContext) -> None:
        super().__init__(context, "none", torch.float32)

    @staticmethod
    def bytes(changes: SiteChanges) -> MemoryEstimate:  # type: ignore[override]
        return OutputMoments.bytes(changes, torch.float32.itemsize, None, torch.float64)


@on_activations("chain-of-merges", ChainOfMergesSettings, _WholeOutputs, merged_inputs=True)
def chain_of_merges(job: Job, settings: ChainOfMergesSettings) -> RegressionSpec:
    """Least squares on each LoRA's own outputs, layer after layer (Chain of Merges, 2025)."""
    return RegressionSpec(
        job.weights, settings.ridge, "none", shrink=settings.shrink, rank=settings.rank
    )
