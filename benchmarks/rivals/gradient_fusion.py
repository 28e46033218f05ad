"""Gradient fusion (Mix-of-Show, Gu et al., NeurIPS 2023, arXiv 2305.18292): RegMean by L-BFGS.

The mean of ‖X_i ΔWᵀ − X_i ΔW_iᵀ‖² over all tokens, each LoRA's on its own inputs, is brought down
by some steps of L-BFGS from the base's weights: where the moments tell little, the base stays.

Every gradient lies within the columns of [up_1 … up_N] = Q R, and so does every step: ΔW = c Q C,
and L-BFGS on C, (Σ r_i, in), takes the steps that it takes on ΔW: no scale c matters to it but in
its first trial step, and that is chosen by it. The result has rank Σ r_i exactly.

It goes in :mod:`.rounds`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from iteris_core.errors import SolveError
from iteris_core.linalg import cut_to, solve_device
from iteris_core.lora import LowRank
from iteris_core.methods.registry import micro_batch_setting, on_model, rank_setting
from iteris_core.passes.batches import REFERENCE, ExecutionConfig
from iteris_core.passes.job import Job, Merged
from iteris_core.settings import Settings, setting
from iteris_core.solve.inputs import NOT_FINITE
from iteris_core.solve.moments import Gram
from iteris_core.solve.problem import Reduction, Solution, StageSolver, finite_as

from .rounds import in_rounds, reads_text

_HISTORY = 25  # pairs that L-BFGS remembers, in the authors' code
_NEVER = 1e-16  # its tolerances there, for both gradient and change


@dataclass(frozen=True)
class GradientFusionSettings(Settings):
    steps: int = setting(
        50, "Steps of L-BFGS at layers that read the picture; 50 in the source.", low=1
    )
    text_steps: int = setting(
        500, "Steps at layers that read the text alone; 500 in the source.", low=1
    )
    rank: int | float | None = rank_setting()
    micro_batch: int = micro_batch_setting()


@on_model("gradient-fusion", GradientFusionSettings)
def gradient_fusion(job: Job, settings: GradientFusionSettings) -> Merged:
    """RegMean's least squares by some steps of L-BFGS from the base (Mix-of-Show, 2023)."""

    def solve(site: str, reduction: Reduction) -> Solution:
        steps = settings.text_steps if reads_text(site) else settings.steps
        change = _descended(cast(Gram, reduction), job.weights, steps)
        change, lost = cut_to(change, settings.rank)
        return Solution(finite_as(change, reduction.changes.like), truncated=lost)

    solver = StageSolver(
        begin=Gram, solve=solve, bytes=lambda site, _: Gram.bytes(job.changes[site])
    )
    return in_rounds(job, solver, ExecutionConfig(settings.micro_batch), REFERENCE)


def _descended(reduced: Gram, weights: Sequence[float], steps: int) -> LowRank:
    reduced.inputs.complete()
    device = solve_device(reduced.inputs.own[0].device)
    changes = reduced.changes.to(device=device).to(torch.float64)
    up = torch.cat([change.up for change in changes.present.values()], dim=1)
    basis = torch.linalg.qr(up).Q
    parts = {i: basis.mT @ change.up @ change.down for i, change in changes.present.items()}
    # Σ w_i G_i, Σ w_i QᵀΔW_i G_i, and Σ w_i ‖X_i ΔW_iᵀ‖²
    moment = basis.new_zeros(changes.shape[1], changes.shape[1])
    right, constant = basis.new_zeros(basis.shape[1], changes.shape[1]), 0.0
    for concept, own in enumerate(reduced.inputs.own):
        gram = own.to(device).double() * weights[concept]
        moment += gram
        if concept in parts:
            product = parts[concept] @ gram
            right += product
            constant += float((product * parts[concept]).sum())
    if not math.isfinite(float(moment.norm())):
        raise SolveError(NOT_FINITE)
    total = float(reduced.inputs.tokens.sum()) * changes.shape[0]
    scale = _scale(basis, 2 * right / total)
    merged = torch.zeros_like(right)
    best, best_loss = merged.clone(), math.inf
    lbfgs = torch.optim.LBFGS(
        [merged],
        lr=1,
        max_iter=steps,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=_NEVER,
        tolerance_change=_NEVER,
    )

    def loss() -> Tensor:
        nonlocal best, best_loss
        change = scale * merged
        over = change @ moment
        merged.grad = 2 * scale * (over - right) / total
        value = ((over - 2 * right) * change).sum().add(constant) / total
        if float(value) < best_loss:
            best, best_loss = change, float(value)
        return value

    lbfgs.step(loss)
    return LowRank(basis, best, changes.like.kernel)


def _scale(basis: Tensor, gradient: Tensor) -> float:
    """c for a first ``gradient``, with regard to C at c = 1.

    The first trial step is min(1, 1 / ‖g‖₁) times the gradient g of what is optimised, which is
    Q ``gradient`` for ΔW and c times ``gradient`` for C.
    """
    step = 1 / max(1.0, float((basis @ gradient).abs().sum()))
    norm = float(gradient.abs().sum())
    return max(step * norm, math.sqrt(step))
