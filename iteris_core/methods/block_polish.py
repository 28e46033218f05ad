"""Adam steps on one part of the model after another: gradients, but never through the whole model.

The closed form fits every layer by itself. No layer sees how a block combines its layers' errors,
such as an attention's softmax those of queries and keys. Here the merged factors of a segment
(:mod:`.segments`) are trained together on

    Σ ‖segment(merged rows) − segment under each row's own LoRA‖²,

in execution order, on inputs that passed through the earlier segments. A segment that does not get
closer to its targets stays as it was.

A gradient step on a change D, (rank, in), moves most where inputs are large and hardly where they
are small, however much the outputs depend on it. For P = D M^½, with M the inputs' moments, every
direction counts by its effect on the outputs: a natural gradient with respect to inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..activations.lockstep import Lockstep
from ..activations.memory import halved, is_out_of_memory, with_less
from ..activations.micro_batch import MicroBatch
from ..errors import OutOfMemory, brief
from ..hosts.protocol import Stage
from ..linalg import full_precision
from ..lora import LowRank
from ..passes.batches import ExecutionConfig, chunks, micro_batches
from ..passes.job import Job, Run
from ..passes.planner import find
from .segments import NotPolished, Segment, SegmentBatch, SegmentRunner, segments_of

WHAT = "polishing blocks"


def expect_block_polish(job: Job, steps: int) -> None:
    """Expect its work: each of several segments takes part of a forward."""
    # A step takes a forward, and two for the gradients.
    forwards = 3.0 * steps * job.thresholds.polish_at_once + 2 * 3 * _row_count(job)
    job.eta.expect(WHAT, [job.forward_work * forwards])


def polish_blocks(
    run: Run, merged: Mapping[str, LowRank], steps: int, rate: float
) -> tuple[dict[str, LowRank], list[str]]:
    """The ``merged`` changes after that many ``steps`` on every segment, and notes on segments
    that are not polished. A factor's learning rate is ``rate`` times the root mean square of its
    entries, and decays to zero."""
    job, lockstep, notes = run.job, run.lockstep, list[str]()
    at_once = job.thresholds.polish_at_once
    lockstep.merged = dict(merged)
    for stage in run.stages():
        if stage.sites and not stage.feeds_next:
            notes += _StagePolish(job, lockstep, stage, steps, rate, at_once).run()
        if stage.feeds_next:
            for batch in micro_batches(stage, 2, None, ExecutionConfig(at_once)):
                lockstep.run(batch)
    job.eta.expect(WHAT, [])
    polished = {s: lockstep.merged[s].to(change.up.dtype) for s, change in merged.items()}
    return polished, notes


def _row_count(job: Job) -> int:
    return max(job.thresholds.polish_rows, job.thresholds.polish_rows_each * len(job.concepts))


@dataclass
class _StagePolish:
    """The polish of one stage. ``in_place``: a segment changes arguments, and gets copies."""

    job: Job
    lockstep: Lockstep
    stage: Stage
    steps: int
    rate: float
    at_once: int
    in_place: bool = False
    notes: list[str] = field(default_factory=list[str])

    def run(self) -> list[str]:
        """Polish the stage; returns notes on what is not polished."""
        found = find(self.stage, self.lockstep)
        found.sites = [site for site in found.sites if site in self.lockstep.merged]
        segments = segments_of(found, self.job.thresholds.segment_share)
        for number, segment in enumerate(segments):
            before = {site: self.lockstep.merged[site] for site in segment.sites}

            def tick(done: int = 0, number: int = number) -> None:
                self.job.tick(WHAT, number * self.steps + done, len(segments) * self.steps)

            if not self._gains(segment, before, tick):
                self.lockstep.merged |= before
        return self.notes

    def _gains(
        self, segment: Segment, before: Mapping[str, LowRank], tick: Callable[..., None]
    ) -> bool:
        """:meth:`_polish`; retries with fewer rows at once when memory runs out, and with copies of
        arguments that the segment changes in place."""

        def polish(rows: int) -> bool:
            self.at_once = rows
            self.lockstep.merged |= before
            try:
                return self._polish(segment, tick)
            except NotPolished as error:
                if self.in_place or "inplace" not in str(error):
                    raise
            self.in_place = True
            return polish(rows)

        try:
            return with_less(halved(self.at_once), polish, lambda said, tried: "")[0]
        except (NotPolished, OutOfMemory) as error:
            why = error if isinstance(error, NotPolished) else "for lack of memory"
        self.notes.append(f"{segment.sites[0]} to {segment.sites[-1]} are not polished, {why}")
        return False

    def _polish(self, segment: Segment, tick: Callable[..., None]) -> bool:
        """True if the segment got closer to its targets."""
        rows, thresholds, generator = self._rows(), self.job.thresholds, self.job.generator
        runner = SegmentRunner(segment, self.lockstep, self._batch(rows[:1]))
        batches: list[SegmentBatch] = []
        taken = 0
        for some in chunks(rows, self.stage.batch_keys, self.at_once):
            tick()
            batches.append(runner.record(self._batch(some), some))
            taken += batches[-1].bytes
            if taken + batches[-1].bytes > thresholds.polish_bytes and len(batches) >= 4:
                break
        checked = batches[: thresholds.polish_checked]
        mutations = torch.autograd.graph.allow_mutation_on_saved_tensors
        copies = mutations() if self.in_place else nullcontext()
        with self.stage.gradients(), runner.gradients(), copies:
            tokens = runner.sample_inputs(self.job.host.sites(), batches, thresholds)
            factors = Factors(self.lockstep.merged, tokens, thresholds.polish_floor)
            before = self._error(runner, checked)
            if not before:
                return False
            scale = 0.01 * (before / sum(w.numel() for b in checked for w in b.wanted)) ** -0.5

            def loss() -> Tensor:
                batch = batches[int(torch.randint(len(batches), (), generator=generator))]
                factors.put(self.lockstep)
                return self._loss(runner, batch) * scale

            factors.train(self.rate, self.steps, loss, tick)
            with torch.no_grad():
                factors.put(self.lockstep)
            return self._error(runner, checked) < before

    def _batch(self, rows: Sequence[int]) -> MicroBatch:
        owners = [self.stage.concept_ids[row] for row in rows]
        run, conditions = partial(self.stage.run, rows, 2), self.stage.conditions_of(rows)
        return MicroBatch(run, owners, 2, conditions=conditions)

    def _rows(self) -> list[int]:
        """Equally many rows of every concept, in random order."""
        order = torch.randperm(len(self.stage.concept_ids), generator=self.job.generator).tolist()
        each = _row_count(self.job) // len(self.job.concepts)
        left = dict.fromkeys(self.stage.concept_ids, each)
        rows: list[int] = []
        for row in order:
            left[self.stage.concept_ids[row]] -= 1
            if left[self.stage.concept_ids[row]] >= 0:
                rows.append(row)
        return rows

    def _loss(self, runner: SegmentRunner, batch: SegmentBatch) -> Tensor:
        mask = None
        if self.stage.mask is not None:
            mask = self.stage.mask(runner.segment.sites[-1], batch.rows)
        by_row: list[Tensor] = []
        for output, wanted in zip(runner(batch), batch.wanted, strict=True):
            errors = (output.float() - wanted.to(output.device).float()).square()
            if mask is not None and errors.ndim == 3 and mask.shape == errors.shape[:2]:
                errors = errors * mask.to(errors.device)[..., None]
            by_row.append(errors.flatten(1).sum(1))
        total, weights = torch.stack(by_row).sum(0), self.job.weights
        return (total * total.new_tensor([weights[owner] for owner in batch.owners])).sum()

    def _error(self, runner: SegmentRunner, batches: Sequence[SegmentBatch]) -> float:
        with torch.no_grad():
            return sum(float(self._loss(runner, batch)) for batch in batches)


@dataclass(frozen=True)
class Whitening:
    """M = XᵀX / tr(XᵀX) · in + floor I for tokens X, (tokens, in), without an (in, in) matrix.
    ``directions`` are the eigenvectors of XᵀX with nonzero eigenvalues, (k, in), and ``roots`` the
    square roots of M's eigenvalues there, (k,); elsewhere the root is √floor. float32."""

    directions: Tensor
    roots: Tensor
    floor: float

    @classmethod
    def of(cls, tokens: Tensor, floor: float) -> Whitening:
        """The whitening of (tokens, in), which must be finite. Tokens that are all zero give √floor
        everywhere."""
        tokens = tokens.double()
        count, width = tokens.shape
        with full_precision(tokens.device):
            gram = tokens.mT @ tokens if width <= count else tokens @ tokens.mT
            values, vectors = torch.linalg.eigh(gram)
            kept = values > 1e-10 * values[-1]
            values, vectors = values[kept], vectors[:, kept]
            if width > count:
                vectors = tokens.mT @ vectors / values.sqrt()
        values = values * (width / float(values.sum())) if len(values) else values
        return cls(vectors.mT.float(), (values + floor).sqrt().float(), floor)

    def root(self, rows: Tensor) -> Tensor:
        """``rows`` (…, in) times M^½."""
        return self._times(rows, self.roots, self.floor**0.5)

    def inverse_root(self, rows: Tensor) -> Tensor:
        """``rows`` (…, in) times M^-½."""
        return self._times(rows, 1 / self.roots, self.floor**-0.5)

    def _times(self, rows: Tensor, values: Tensor, elsewhere: float) -> Tensor:
        within = rows @ self.directions.mT
        return rows * elsewhere + (within * (values - elsewhere)) @ self.directions


class Factors:
    """Up and down factors by site, as float32 leaves. Down factors are those for whitened inputs,
    so a step of a given size moves a site's output about equally in every direction."""

    def __init__(
        self, merged: Mapping[str, LowRank], tokens: Mapping[str, Tensor], floor: float
    ) -> None:
        """The factors of the sites whose inputs, (tokens, in), are given; up and down have equal
        norm."""
        self.kernels = {site: merged[site].kernel for site in tokens}
        self.whitenings = {site: Whitening.of(some, floor) for site, some in tokens.items()}
        self.ups: dict[str, Tensor] = {}
        self.downs: dict[str, Tensor] = {}
        for site, whitening in self.whitenings.items():
            change = merged[site].to(torch.float32, whitening.roots.device)
            up, across = torch.linalg.qr(change.up)
            whole = across @ whitening.root(change.down)
            left, values, right = torch.linalg.svd(whole, full_matrices=False)
            root = values.sqrt()
            self.ups[site] = (up @ left * root).detach().requires_grad_()
            self.downs[site] = (root[:, None] * right).detach().requires_grad_()

    def put(self, lockstep: Lockstep) -> None:
        """Install the factors as merged changes, with gradients if enabled."""
        for site, whitening in self.whitenings.items():
            up, down = self.ups[site], whitening.inverse_root(self.downs[site])
            if not torch.is_grad_enabled():
                up, down = up.detach(), down.detach()
            lockstep.merged[site] = LowRank(up, down, self.kernels[site])

    def train(
        self, rate: float, steps: int, loss: Callable[[], Tensor], tick: Callable[[int], None]
    ) -> None:
        """Take that many steps of Adam. A factor's learning rate is ``rate`` times the root mean
        square of its entries; it rises over ten steps and falls to zero.

        ``loss()`` draws a random batch; ``tick`` gets the number of steps done. Raises
        :class:`NotPolished` if a step is impossible.
        """
        why = "because it cannot be differentiated"
        factors = [*self.ups.values(), *self.downs.values()]
        groups: list[dict[str, Any]] = [
            {"params": [factor], "lr": rate * float(factor.detach().square().mean().sqrt())}
            for factor in factors
        ]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps)
        )
        for step in range(1, steps + 1):
            with torch.enable_grad():
                error, gradients = loss(), list[Tensor | None]()
            try:
                if error.requires_grad:
                    gradients += torch.autograd.grad(error, factors, allow_unused=True)
            except RuntimeError as failed:
                if is_out_of_memory(failed):
                    raise
                raise NotPolished(f"{why} ({brief(failed)})") from failed
            # A site that does not reach the loss has none, such as a text encoder's last layers.
            if all(gradient is None for gradient in gradients):
                raise NotPolished(f"{why} (no change reaches the compared output)")
            for factor, gradient in zip(factors, gradients, strict=True):
                factor.grad = gradient
            adam.step()
            schedule.step()
            tick(step)
