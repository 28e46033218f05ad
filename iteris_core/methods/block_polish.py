"""Adam steps on one part of the model after another: gradients, but never through the whole model.

The closed form fits every layer by itself. No layer sees how a block combines its layers' errors,
such as an attention's softmax those of queries and keys. Here the merged factors of a segment
(:mod:`.segments`) are trained together on

    Σ ‖segment(merged rows) − segment under each row's own LoRA‖²,

in execution order, on inputs that passed through the earlier segments, with :mod:`.training`. A
share of the steps uses images of two concepts (:mod:`.side_by_side`). A segment that does not get
closer to its targets stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from ..activations.lockstep import Lockstep
from ..activations.memory import halved, with_less
from ..activations.micro_batch import MicroBatch
from ..errors import OutOfMemory
from ..hosts.protocol import Stage
from ..lora import LowRank
from ..passes.batches import ExecutionConfig, chunks, micro_batches
from ..passes.job import Job, Run
from ..passes.planner import find
from .segments import NotReproduced, Segment, SegmentBatch, SegmentRunner, segments_of, within
from .side_by_side import SHOWING, SideBySide, drawn_pairs, pairs_of, samples_each
from .training import STEP, Factors, NoGradients

WHAT = "polishing blocks"


@dataclass(frozen=True)
class BlockSteps:
    """``steps`` for every segment; a ``pairs`` share of them use images of two concepts. A factor's
    learning rate is ``rate`` times the root mean square of its entries, and decays to zero."""

    steps: int
    rate: float
    pairs: float


def expect_block_polish(job: Job, how: BlockSteps) -> None:
    """Expect its work: each of several segments takes part of a forward."""
    rows, forward = _row_count(job), job.forward_work
    forwards = STEP * how.steps * job.thresholds.polish_at_once + 2 * 3 * rows
    if how.pairs and (pairs := pairs_of(job, rows)):
        samples = len(pairs) * samples_each(job, pairs, rows)
        job.eta.expect(SHOWING, [forward * samples * job.calibration.denoising_steps])
        forwards += samples * job.calibration.rows_each * 3 * 3
    job.eta.expect(WHAT, [forward * forwards])


def polish_blocks(
    run: Run, merged: Mapping[str, LowRank], how: BlockSteps
) -> tuple[dict[str, LowRank], list[str]]:
    """The ``merged`` changes after polishing every segment, and notes on them."""
    job, lockstep, notes = run.job, run.lockstep, list[str]()
    at_once = job.thresholds.polish_at_once
    drawn = drawn_pairs(job, merged, _row_count(job)) if how.pairs else None
    if how.pairs and drawn is None and job.host.pictures and job.loras > 1:
        notes.append(
            "blocks are polished without images of two concepts; that takes two subjects, each "
            "with a trigger or class word and without its own embedding"
        )
    lockstep.merged = dict(merged)
    showing = drawn and SideBySide(job, lockstep, drawn)
    for stage in run.stages():
        if stage.sites and not stage.feeds_next:
            shown = showing if showing and showing.advance(stage.name) else None
            notes += _StagePolish(job, lockstep, stage, how, shown, at_once).run()
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
    how: BlockSteps
    shown: SideBySide | None
    at_once: int
    paired: bool = False
    in_place: bool = False
    notes: list[str] = field(default_factory=list[str])

    def run(self) -> list[str]:
        """Polish the stage; returns notes on what is not polished."""
        found = find(self.stage, self.lockstep)
        found.sites = [site for site in found.sites if site in self.lockstep.merged]
        segments = segments_of(found, self.job.thresholds.segment_share)
        for number, segment in enumerate(segments):
            before = {site: self.lockstep.merged[site] for site in segment.sites}
            tick = partial(self._tick, number, len(segments))
            if not self._gains(segment, before, tick):
                self.lockstep.merged |= before
        if segments and self.shown is not None and not self.paired:
            self.notes.append(
                f"the {self.stage.name}'s blocks are polished without images of two concepts, "
                "because it is unknown where in the image their outputs belong"
            )
        return self.notes

    def _tick(self, number: int, count: int, done: int = 0) -> None:
        steps = self.how.steps
        self.job.tick(WHAT, number * steps + done, count * steps)

    def _gains(self, segment: Segment, before: Mapping[str, LowRank], tick: partial[None]) -> bool:
        """:meth:`_polish`; retries with fewer rows at once when memory runs out, and with copies of
        arguments that the segment changes in place."""

        def polish(rows: int) -> bool:
            self.at_once = rows
            self.lockstep.merged |= before
            try:
                return self._polish(segment, tick)
            except NoGradients as error:
                if self.in_place or "inplace" not in str(error):
                    raise
            self.in_place = True
            return polish(rows)

        try:
            return with_less(halved(self.at_once), polish, lambda said, tried: "")[0]
        except NoGradients as error:
            why = f"because it cannot be differentiated ({error})"
        except OutOfMemory:
            why = "for lack of memory"
        except NotReproduced:
            why = "because they give a different result when run by themselves"
        first, *_, last = segment.sites
        self.notes.append(f"{first} to {last} are not polished, {why}")
        return False

    def _polish(self, segment: Segment, tick: partial[None]) -> bool:
        """True if the segment got closer to its targets."""
        rows = self._rows()
        runner = SegmentRunner(segment, self.lockstep, self._batch(rows[:1]))

        def recorded() -> Iterator[SegmentBatch]:
            for some in chunks(rows, self.stage.batch_keys, self.at_once):
                tick()
                yield runner.record(self._batch(some), some)

        thresholds, generator = self.job.thresholds, self.job.generator
        most = thresholds.polish_bytes // (1 if self.shown is None else 2)
        singles, pairs = within(recorded(), most, 4), list[SegmentBatch]()
        if self.shown is not None:
            pairs = within(self.shown.recorded(runner, self.at_once, tick), most, 1)
            self.paired |= bool(pairs)
        checked = [b for some in (singles, pairs) for b in some[: thresholds.polish_checked]]
        mutations = torch.autograd.graph.allow_mutation_on_saved_tensors
        copies = mutations() if self.in_place else nullcontext()
        with self.stage.gradients(), runner.gradients(), copies:
            modules = self.job.host.sites()
            tokens = runner.sample_inputs(modules, [*singles, *pairs], thresholds)
            factors = Factors.white(self.lockstep.merged, tokens, thresholds.polish_floor)
            before = self._error(runner, checked)
            if not before:
                return False
            scale = 0.01 * (before / sum(w.numel() for b in checked for w in b.wanted)) ** -0.5

            def loss() -> Tensor:
                paired = pairs and float(torch.rand((), generator=generator)) < self.how.pairs
                some = pairs if paired else singles
                batch = some[int(torch.randint(len(some), (), generator=generator))]
                factors.put(self.lockstep)
                return self._loss(runner, batch) * scale

            factors.train(self.how.rate, self.how.steps, loss, tick)
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
        means = [fmean(weights[owner] for owner in owners) for owners in batch.owners]
        return (total * total.new_tensor(means)).sum()

    def _error(self, runner: SegmentRunner, batches: Sequence[SegmentBatch]) -> float:
        with torch.no_grad():
            return sum(float(self._loss(runner, batch)) for batch in batches)
