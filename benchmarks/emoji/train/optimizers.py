"""Muon for the denoiser's matrices, AdamW for the rest, and schedules that end when asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

PEAK = 1.5e-3
"""AdamW's rate; Muon's, whose updates are scaled to the size of AdamW's, is MUON times as high."""

MUON = 2.0

WARM = 200


def optimizers(
    denoiser: nn.Module, encoders: Sequence[nn.Module], peak: float = PEAK, *, muon: bool = True
) -> list[torch.optim.Optimizer]:
    """For a denoiser and its text encoders. Embeddings do not decay: the words that hide what a
    LoRA teaches are never seen, and must not fade. Without ``muon`` AdamW has all weights: Muon
    computes in bfloat16, at a seventh of the speed where a CPU only emulates it."""
    matrices = [
        weight
        for name, weight in denoiser.named_parameters()
        if muon and weight.ndim == 2 and "transformer_blocks" in name
    ]
    taken = {id(weight) for weight in matrices}
    embeddings = [
        module.weight
        for encoder in encoders
        for module in encoder.modules()
        if isinstance(module, nn.Embedding)
    ]
    embeddings = list({id(weight): weight for weight in embeddings}.values())
    taken |= {id(weight) for weight in embeddings}
    every = [weight for model in (denoiser, *encoders) for weight in model.parameters()]
    others = list({id(weight): weight for weight in every if id(weight) not in taken}.values())
    groups = [{"params": others}, {"params": embeddings, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    if not matrices:
        return [adamw]
    how = {"weight_decay": 0.05, "ns_steps": 4, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(matrices, lr=MUON * peak, **how), adamw]


def steady(optimizer: torch.optim.Optimizer, peak: float, steps: int):
    """A short rise to `peak`, which then stays: how long it will train need not be known."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM))


def falling(optimizer: torch.optim.Optimizer, peak: float, steps: int, begun: int = 0):
    """From `peak` at the step `begun` down to nothing at `steps`."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, max(0.0, (steps - step) / (steps - begun))) ** 1.5
    )
