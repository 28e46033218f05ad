"""LoRACLR (Simsar et al., CVPR 2025, arXiv 2412.09622): each to its own outputs, off the others'.

By AdamW from the base's weights, on each LoRA's own inputs, as the authors' code has it:

    c · mean_i (d_ii² + max(0, m − min_{j≠i} d_ij)²) + a · (mean squared error) + b · ‖ΔW‖,

d_ij = ‖Ŷ_i − Y_j‖ over all tokens, Ŷ_i what the merged layer gives for concept i, Y_j what LoRA j's
own gives for concept j, token by token in their order. With E_i = ΔW − ΔW_i, Ŷ_i − Y_j is
X_i E_iᵀ + Y_i − Y_j, so that d_ij needs X_iᵀX_i, (Y_i − Y_j)ᵀX_i and ‖Y_i − Y_j‖² alone, and
neither weights nor a bias. It goes in :mod:`.rounds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from iteris_core.activations.tokens import Observation
from iteris_core.errors import SolveError
from iteris_core.linalg import cut_dense, full_precision, solve_device
from iteris_core.lora import SiteChanges
from iteris_core.methods.registry import micro_batch_setting, on_model, rank_setting
from iteris_core.passes.batches import SWEEP, ExecutionConfig
from iteris_core.passes.job import Job, Merged
from iteris_core.settings import Settings, setting
from iteris_core.solve.inputs import NOT_FINITE
from iteris_core.solve.problem import (
    MemoryEstimate,
    Reduction,
    RegressionSpec,
    Solution,
    StageSolver,
    finite_as,
)

from .rounds import in_rounds

_DECAY = 1e-4  # of AdamW, as in the source
_LEAST = 1e-12  # under a root, likewise


@dataclass(frozen=True)
class LoraclrSettings(Settings):
    steps: int = setting(50, "Steps of AdamW; 50 in the source.", low=1)
    rate: float = setting(
        1e-4,
        "Learning rate; 1e-4 in the source. No entry moves by more than about steps × rate.",
        above=0,
    )
    margin: float = setting(
        0.5,
        "How far a concept's outputs, all tokens together, are kept from the nearest other's (m).",
        low=0,
    )
    contrast: float = setting(1.0, "What the contrastive loss counts (c).", low=0)
    error: float = setting(0.1, "What the mean squared error counts (a).", low=0)
    size: float = setting(0.001, "What the norm of the merged change counts (b).", low=0)
    rank: int | float | None = rank_setting()
    micro_batch: int = micro_batch_setting()


@on_model("loraclr", LoraclrSettings, sweeps=lambda settings: 1)
def loraclr(job: Job, settings: LoraclrSettings) -> Merged:
    """Each concept near its own LoRA's outputs, off the nearest other's (LoRACLR, CVPR 2025)."""
    fit = RegressionSpec(job.weights, 0.0, "none", rank=settings.rank)
    solver = StageSolver(
        begin=lambda context: _Pairs(context.changes, context.device, settings),
        solve=lambda _, reduced: reduced.solve(fit),
        bytes=lambda site, _: _Pairs.bytes(job.changes[site]),
    )
    # A sweep, so that the tokens of one site alone are there at a time; what it solves is not used.
    batching = ExecutionConfig(
        settings.micro_batch, "enough", job.calibration.seed, thresholds=job.thresholds
    )
    return in_rounds(job, solver, batching, SWEEP)


class _Pairs(Reduction):
    """X_iᵀX_i, and of two concepts (Y_i − Y_j)ᵀX_i and ‖Y_i − Y_j‖², in float32, of as many tokens
    as every concept has; ``_count`` of them."""

    def __init__(
        self, changes: SiteChanges, device: torch.device, settings: LoraclrSettings
    ) -> None:
        super().__init__(changes)
        self._settings = settings
        concepts, (out, width) = len(changes), changes.shape
        self._grams = torch.zeros(concepts, width, width, device=device)
        self._crossed = torch.zeros(concepts, concepts, out, width, device=device)
        self._apart = torch.zeros(concepts, concepts, device=device)
        self._count = torch.zeros((), dtype=torch.float64)
        self._waiting: list[list[Tensor]] = [[] for _ in range(2 * concepts)]

    def add(self, tokens: Observation) -> None:
        self._waiting[2 * tokens.concept].append(tokens.reference.float())
        self._waiting[2 * tokens.concept + 1].append(tokens.output.float())
        if all(self._waiting):
            self._fold()

    def _fold(self) -> None:
        """Take in as many tokens as every concept has waiting."""
        waiting = [torch.cat(parts) for parts in self._waiting]
        count = min(map(len, waiting))
        self._waiting = [[rest[count:]] if len(rest) > count else [] for rest in waiting]
        inputs, outputs = ([tokens[:count] for tokens in waiting[start::2]] for start in range(2))
        with full_precision(self._grams.device):
            for i, (own, given) in enumerate(zip(inputs, outputs, strict=True)):
                self._grams[i].addmm_(own.mT, own)
                for j, other in enumerate(outputs):
                    gap = given - other
                    self._crossed[i, j].addmm_(gap.mT, own)
                    self._apart[i, j] += (gap**2).sum()
        self._count += count

    def solve(self, fit: RegressionSpec) -> Solution:
        with full_precision(self._grams.device):
            return self._descended(fit)

    def _descended(self, fit: RegressionSpec) -> Solution:
        settings = self._settings
        changes = self.changes.to(torch.float32, self._grams.device)
        own = torch.stack(
            [
                torch.zeros(changes.shape).to(self._grams) if change is None else change.dense()
                for change in changes
            ]
        )
        shares = settings.contrast * torch.tensor(fit.weights).to(own) / sum(fit.weights)
        error = settings.error / (max(float(self._count), 1.0) * own[0].shape[0] * len(own))
        merged = torch.zeros_like(own[0])
        best, best_loss = merged.clone(), math.inf
        adam = torch.optim.AdamW([merged], lr=settings.rate, weight_decay=_DECAY)
        for _ in range(settings.steps):
            loss, merged.grad = self._loss(merged, own, shares, error)
            if not math.isfinite(loss):
                raise SolveError(NOT_FINITE)
            if loss < best_loss:
                best, best_loss = merged.clone(), loss
            adam.step()
        best = best.to(solve_device(best.device)).double()
        change, lost = cut_dense(self.changes, best, fit.rank)
        return Solution(finite_as(change, self.changes.like), truncated=lost)

    def _loss(
        self, merged: Tensor, own: Tensor, shares: Tensor, error: float
    ) -> tuple[float, Tensor]:
        """The loss and its gradient; ``shares`` are c of every concept, and ``error`` a."""
        gaps = merged - own
        turned = gaps @ self._grams  # half of what d_ii² grows by
        squares = (turned * gaps).sum((1, 2))
        crossed = (self._crossed * gaps[:, None]).sum((2, 3))
        others = (self._apart + 2 * crossed + squares[:, None]).clamp(min=_LEAST).sqrt()
        itself = torch.eye(len(gaps), device=gaps.device).bool()
        nearest, which = others.masked_fill(itself, math.inf).min(dim=1)
        pushed = (self._settings.margin - nearest).clamp(min=0)
        norm = merged.norm()
        loss = (shares * (squares + pushed**2)).sum() + error * squares.sum()
        loss = loss + self._settings.size * norm
        each = torch.arange(len(gaps), device=gaps.device)
        away = (shares * pushed / nearest)[:, None, None]
        gradient = (2 * (shares + error))[:, None, None] * turned
        gradient = gradient - 2 * away * (self._crossed[each, which] + turned)
        size = self._settings.size / norm.clamp(min=_LEAST)
        return float(loss), gradient.sum(dim=0) + size * merged

    @staticmethod
    def bytes(changes: SiteChanges) -> MemoryEstimate:
        """Bytes of what is summed up; a step of AdamW has six matrices of the change's size, and
        six of every concept's and one of every two concepts'."""
        out, width = changes.shape
        concepts = len(changes)
        sums = 4 * concepts * width * (width + concepts * out)
        return MemoryEstimate(sums, 4 * out * width * (6 + 6 * concepts + concepts**2))
