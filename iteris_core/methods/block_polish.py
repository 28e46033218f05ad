"""Adam steps on one part of the model after the other: gradients, but never through the model.

The closed form fits every layer by itself. What a block makes of its layers' errors, such as the
softmax of an attention of those of its queries and keys, no layer sees. Here the merged factors of
a segment (:mod:`..activations.segments`) are trained together on

    Σ ‖segment(merged rows) − what the segment gives under each row's own LoRA‖²,

in execution order, on inputs that passed the segments before. The factors are trained where inputs
are white (:mod:`..linalg.whitening`). A share of the steps is on pictures that show two concepts
(:mod:`.side_by_side`). A segment that does not come nearer to what it is to give
stays as it was.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..activations.lockstep import Lockstep
from ..activations.meter import is_out_of_memory
from ..activations.micro_batch import MicroBatch
from ..activations.segments import (
    ByRow,
    Passage,
    Segment,
    pass_through,
    plain_weights,
    segments_of,
)
from ..activations.site import site_of
from ..errors import IterisError, brief
from ..hosts.protocol import Stage
from ..linalg.whitening import Whitening
from ..lora import LowRank
from ..passes.batches import Batching, chunks, micro_batches
from ..passes.job import Job
from ..passes.ways import find
from .side_by_side import SHOWING, SideBySide, drawn_pairs, pairs_of, samples_each

_log = logging.getLogger(__name__)
WHAT = "polishing blocks"
ROWS, ROWS_EACH = 256, 64
"""So many rows pass every segment, and so many of each concept where they are many."""
AT_ONCE = 16
CHECKED = 8
"""So many micro-batches tell whether a segment gained."""
MOST_BYTES = 4 << 30
"""Of host memory for what enters a segment; fewer rows are taken where they are larger."""
FLOOR = 1e-3
TOKENS = 4096
"""So many tell the moments of a site's inputs."""
_SAME = 1e-2
_STEP = 3.0  # forwards: one, and twice as much for the gradients


@dataclass(frozen=True)
class Adam:
    """``steps`` for every segment, a ``pairs`` share of them on pictures of two concepts. A
    factor's learning rate is ``rate`` times the root mean square of its entries, and falls to
    zero."""

    steps: int
    rate: float
    pairs: float


def expect_block_polish(job: Job, adam: Adam) -> None:
    """Tell the job's outlook of it: of several segments each takes part of a forward."""
    rows = _row_count(job)
    forwards = _STEP * adam.steps * AT_ONCE + 2 * 3 * rows
    if adam.pairs and (pairs := pairs_of(job, rows)):
        samples = len(pairs) * samples_each(job, pairs, rows)
        job.outlook.later(SHOWING, samples * job.calibration.denoising_steps)
        forwards += samples * job.calibration.timesteps * 3 * 3
    job.outlook.later(WHAT, forwards)


def polish_blocks(job: Job, merged: Mapping[str, LowRank], adam: Adam) -> dict[str, LowRank]:
    """The ``merged`` changes after some steps for every segment."""
    drawn = drawn_pairs(job, merged, _row_count(job)) if adam.pairs else None
    if adam.pairs and drawn is None and job.host.pictures and job.loras > 1:
        job.ran.notes.append(
            "blocks are polished without pictures of two concepts, which need two that are things, "
            "have a trigger or a class word, and no embedding of their own"
        )
    with job.lockstep() as lockstep:
        samples = job.samples(lockstep)
        lockstep.merged = dict(merged)
        showing = drawn and SideBySide(job, lockstep, drawn)
        for stage in job.host.stages(samples, set(job.changes)):
            if stage.sites and not stage.feeds:
                shown = showing if showing and showing.advance(stage.name) else None
                _Polish(job, lockstep, stage, adam, shown).run()
            if stage.feeds:
                batching = Batching(AT_ONCE)
                for batch in micro_batches(stage, 2, None, batching):
                    lockstep.run(batch)
        changes = lockstep.merged
    dtypes = {site: change.up.dtype for site, change in merged.items()}
    return {site: changes[site].to(dtypes[site]) for site in merged}


def _row_count(job: Job) -> int:
    return max(ROWS, ROWS_EACH * len(job.concepts))


class _NoGradients(IterisError):
    """The segment has an operation that cannot be differentiated."""


@dataclass
class _Polish:
    """The polish of one stage."""

    job: Job
    lockstep: Lockstep
    stage: Stage
    adam: Adam
    shown: SideBySide | None
    at_once: int = AT_ONCE
    paired: bool = False
    in_place: bool = False

    def run(self) -> None:
        segments = segments_of(find(self.stage, self.lockstep))
        for number, segment in enumerate(segments):
            before = {site: self.lockstep.merged[site] for site in segment.sites}
            while (gained := self._tried(segment, number, len(segments))) is None:
                self.lockstep.merged |= before
            if not gained:
                self.lockstep.merged |= before
        if segments and self.shown is not None and not self.paired:
            self.job.ran.notes.append(
                f"the {self.stage.name}'s blocks are polished without pictures of two concepts, "
                "since it is not known where in a picture what they give belongs"
            )

    def _tried(self, segment: Segment, number: int, count: int) -> bool | None:
        """:meth:`_polish`; None: once more, with fewer rows at once, since memory ran out, or with
        copies of what the segment changes in place."""
        try:
            return self._polish(segment, number, count)
        except _NoGradients as error:
            if "inplace" in str(error) and not self.in_place:
                self.in_place = True
                return None
            self._note(segment, f"since it cannot be differentiated ({error})")
            return False
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        gc.collect()  # frames that the error has left
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.at_once == 1:
            self._note(segment, "for want of memory")
            return False
        self.at_once //= 2
        return None

    def _note(self, segment: Segment, why: str) -> None:
        first, *_, last = segment.sites
        self.job.ran.notes.append(f"{first} to {last} are not polished, {why}")

    def _polish(self, segment: Segment, number: int, count: int) -> bool:
        """Whether the segment came nearer to what it is to give."""

        def tick(done: int = 0) -> None:
            self.job.tick(WHAT, number * self.adam.steps + done, count * self.adam.steps)

        rows = self._rows()
        by_row = ByRow.of(segment, self.lockstep, self._batch(rows[:1]))
        singles = self._passages(segment, rows, by_row, tick)
        pairs: list[Passage] = []
        if self.shown is not None:
            pairs = self.shown.passages(segment, by_row, self.at_once, self._most_bytes, tick)
            self.paired |= bool(pairs)
        passages = [*singles, *pairs]
        checked = singles[:CHECKED] + pairs[:CHECKED]
        modules = self.job.host.sites()
        with self.stage.gradients(), plain_weights(segment.module) as weights:
            runner = _Runner(self.lockstep, segment, weights, by_row)
            tokens = _tokens(runner, modules, passages)
            if tokens is None:
                self._note(segment, "since by themselves they give something else")
                return False
            factors = _Factors.of(self.lockstep.merged, tokens)
            before = self._error(runner, checked)
            if not before:
                return False
            adam = torch.optim.Adam(factors.groups(self.adam.rate), betas=(0.9, 0.99))
            schedule = torch.optim.lr_scheduler.LambdaLR(adam, self._warm)
            scale = 0.01 * (before / sum(w.numel() for p in checked for w in p.wanted)) ** -0.5
            for step in range(self.adam.steps):
                passage = self._picked(singles, pairs)
                with torch.enable_grad(), self._mutations():
                    factors.put(self.lockstep)
                    loss = self._loss(runner, passage) * scale
                    gradients = _gradients(loss, factors.all)
                for factor, gradient in zip(factors.all, gradients, strict=True):
                    factor.grad = gradient
                adam.step()
                schedule.step()
                tick(step + 1)
            factors.put(self.lockstep, final=True)
            return self._error(runner, checked) < before

    def _mutations(self) -> AbstractContextManager[Any]:
        if self.in_place:
            return torch.autograd.graph.allow_mutation_on_saved_tensors()
        return nullcontext()

    def _warm(self, step: int) -> float:
        return min(1.0, (step + 1) / 10) * (1 - step / self.adam.steps)

    def _picked(self, singles: Sequence[Passage], pairs: Sequence[Passage]) -> Passage:
        generator = self.job.generator
        paired = pairs and float(torch.rand((), generator=generator)) < self.adam.pairs
        some = pairs if paired else singles
        return some[int(torch.randint(len(some), (), generator=generator))]

    def _passages(
        self, segment: Segment, chosen: Sequence[int], by_row: ByRow, tick: Callable[[], None]
    ) -> list[Passage]:
        """As many as host memory holds."""
        passages: list[Passage] = []
        taken = 0
        for rows in chunks(chosen, self.stage.kinds, self.at_once):
            tick()
            batch = self._batch(rows)
            passages.append(pass_through(segment, self.lockstep, batch, rows, by_row))
            taken += passages[-1].bytes
            if taken + passages[-1].bytes > self._most_bytes and len(passages) > 3:
                break
        return passages

    @property
    def _most_bytes(self) -> int:
        return MOST_BYTES if self.shown is None else MOST_BYTES // 2

    def _batch(self, rows: Sequence[int]) -> MicroBatch:
        owners = [self.stage.owners[row] for row in rows]
        return MicroBatch(lambda: self.stage.run(rows, 2), owners, 2)

    def _rows(self) -> list[int]:
        """As many of every concept, in any order."""
        order = torch.randperm(len(self.stage.owners), generator=self.job.generator).tolist()
        each = _row_count(self.job) // len(self.job.concepts)
        left = dict.fromkeys(self.stage.owners, each)
        rows: list[int] = []
        for row in order:
            left[self.stage.owners[row]] -= 1
            if left[self.stage.owners[row]] >= 0:
                rows.append(row)
        return rows

    def _loss(self, runner: _Runner, passage: Passage) -> Tensor:
        by_row: list[Tensor] = []
        for output, wanted in zip(runner(passage), passage.wanted, strict=True):
            errors = (output.float() - wanted.to(output.device).float()).square()
            mask = self._mask(runner.segment, passage, errors)
            by_row.append((errors if mask is None else errors * mask).flatten(1).sum(1))
        total = torch.stack(by_row).sum(0)
        return (total * total.new_tensor(self._weights(passage))).sum()

    def _weights(self, passage: Passage) -> list[float]:
        weights = self.job.weights
        return [fmean(weights[owner] for owner in owners) for owners in passage.owners]

    def _mask(self, segment: Segment, passage: Passage, errors: Tensor) -> Tensor | None:
        """1 where a token counts, where the segment gives tokens."""
        if self.stage.mask is None or errors.ndim != 3:
            return None
        mask = self.stage.mask(segment.sites[-1], passage.rows)
        if mask is None or mask.shape != errors.shape[:2]:
            return None
        return mask.to(errors.device)[..., None]

    def _error(self, runner: _Runner, passages: Sequence[Passage]) -> float:
        with torch.no_grad():
            return sum(float(self._loss(runner, passage)) for passage in passages)


@dataclass(frozen=True)
class _Runner:
    """Runs a segment on merged rows alone."""

    lockstep: Lockstep
    segment: Segment
    weights: Mapping[str, Tensor]
    by_row: ByRow

    def __call__(self, passage: Passage) -> Sequence[Tensor]:
        outputs: list[Tensor] = []
        args, kwargs = passage.arguments()

        def run() -> None:
            output = functional_call(self.segment.module, dict(self.weights), args, kwargs)
            outputs.extend(self.by_row.outputs_of(output))

        batch = MicroBatch(run, [first for first, *_ in passage.owners], 1, merged_only=True)
        self.lockstep.run(batch, grad=torch.is_grad_enabled())
        return outputs


@dataclass(frozen=True)
class _Factors:
    """Up factors, and down factors where inputs are white, by site; float32 leaves."""

    ups: Mapping[str, Tensor]
    downs: Mapping[str, Tensor]
    whitenings: Mapping[str, Whitening]
    kernels: Mapping[str, Any]

    @classmethod
    def of(cls, merged: Mapping[str, LowRank], tokens: Mapping[str, Tensor]) -> _Factors:
        """Of the ``merged`` changes of those sites whose inputs are given, (tokens, in)."""
        ups: dict[str, Tensor] = {}
        downs: dict[str, Tensor] = {}
        whitenings = {site: Whitening.of(some, FLOOR) for site, some in tokens.items()}
        for site, whitening in whitenings.items():
            change = merged[site].to(torch.float32, whitening.roots.device)
            up, across = torch.linalg.qr(change.up)
            left, values, right = torch.linalg.svd(
                across @ whitening.root(change.down), full_matrices=False
            )
            root = values.sqrt()
            ups[site] = (up @ left * root).detach().requires_grad_()
            downs[site] = (root[:, None] * right).detach().requires_grad_()
        kernels = {site: merged[site].kernel for site in whitenings}
        return cls(ups, downs, whitenings, kernels)

    @property
    def all(self) -> list[Tensor]:
        return [*self.ups.values(), *self.downs.values()]

    def groups(self, rate: float) -> list[dict[str, Any]]:
        return [
            {"params": [factor], "lr": rate * float(factor.detach().square().mean().sqrt())}
            for factor in self.all
        ]

    def put(self, lockstep: Lockstep, *, final: bool = False) -> None:
        """As merged changes; ``final``: without their gradients."""
        for site, whitening in self.whitenings.items():
            up, down = self.ups[site], whitening.inverse_root(self.downs[site])
            if final:
                up, down = up.detach(), down.detach()
            lockstep.merged[site] = LowRank(up, down, self.kernels[site])


def _gradients(loss: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    try:
        return torch.autograd.grad(loss, factors, allow_unused=True, materialize_grads=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise _NoGradients(brief(error)) from error


def _tokens(
    runner: _Runner, modules: Mapping[str, nn.Module], passages: Sequence[Passage]
) -> dict[str, Tensor] | None:
    """Some of the inputs of every site of the segment, (tokens, in); None where it does not give
    by itself what it gave within the model."""
    tokens: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    each = -(-TOKENS // len(passages))

    def noting(site: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            shown = site_of(site, module).tokens(args[0].detach())
            # At random: tokens of a row come in turn, and every so manieth are not like the others.
            some = torch.randperm(len(shown), generator=generator)[:each]
            tokens.setdefault(site, []).append(shown[some.to(shown.device)].float())

        return note

    handles = [modules[s].register_forward_pre_hook(noting(s)) for s in runner.segment.sites]
    try:
        with torch.no_grad():
            if not all(_alike(runner(passage), passage.found) for passage in passages):
                return None
    except Exception as error:  # a row's share of an argument may not be told from another
        if is_out_of_memory(error):
            raise
        _log.debug("%s cannot be run by itself", runner.segment.sites[0], exc_info=True)
        return None
    finally:
        for handle in handles:
            handle.remove()
    return {site: torch.cat(some) for site, some in tokens.items()}


def _alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return bool(others) and all(
        one.shape == other.shape
        and float((one.float().cpu() - other.float()).norm()) <= _SAME * float(other.float().norm())
        for one, other in zip(some, others, strict=True)
    )
