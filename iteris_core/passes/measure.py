"""Measures the cost of a stage's row: bytes at every site.

It pauses as in a sweep, with any strategy. One row runs, then the same row twice. The second row's
addition is the cost of a row; the rest is a forward's fixed cost (weights that are cast or moved to
the device).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from ..activations.activation_offload import ActivationOffload
from ..activations.host_pool import OffloadStore, wait_for
from ..activations.lockstep import Lockstep
from ..activations.meter import MemoryMeter
from ..activations.micro_batch import MicroBatch
from ..activations.replay import Barriers
from ..activations.token_sampling import TokenSampling
from ..activations.tokens import Group, Observation
from ..hosts.protocol import Stage

Limit = Callable[[int], int] | None
"""The number of a row's tokens that count at a site with that many inputs; None: all."""


@dataclass(frozen=True)
class Step:
    """A row's step to ``site`` from the previous site: bytes that it holds there (``waiting``), its
    peak on the way (``running``), its tensors that the solve reads (``shown``), and their
    reductions (``reduced``). ``forward`` is used on the way regardless of the number of rows. The
    inputs of the sites ``beside`` are still alive there, so others may share their moments; for a
    site that ``shares``, the moments of its inputs already exist. A row has ``length`` tokens
    there."""

    site: str
    waiting: int = 0
    running: int = 0
    shown: int = 0
    reduced: int = 0
    forward: int = 0
    beside: Sequence[str] = ()
    shares: bool = False
    length: int = 0


@dataclass(frozen=True)
class Cost:
    """The cost of one row with all its copies: its ``steps`` in order, the last one to the model's
    end (site ""). One copy takes about ``seconds``. ``device`` is where its tensors are."""

    steps: Sequence[Step]
    device: torch.device
    seconds: float = 0.0

    @property
    def waiting(self) -> int:
        """The maximum over all sites."""
        return max(step.waiting for step in self.steps)


@dataclass(frozen=True)
class Measure:
    """A measurement of the longest row of ``stage``, with ``limit`` on the tokens that count, and
    moments of ``itemsize`` bytes."""

    stage: Stage
    lockstep: Lockstep
    copies: int
    limit: Limit = None
    itemsize: int = 4

    def row(self, barriers: Barriers | None = None, place: OffloadStore | None = None) -> Cost:
        """The cost of a row that waits on the device, or in ``place``, at the end of each of the
        ``barriers`` (None: at every site).

        The first run casts changes to the model's dtype, and loads weights that are offloaded as a
        whole model. Both stay on the device and belong to no row, so a run that leaves something
        behind does not count.
        """
        row = _longest(self.stage)

        def run(rows: Sequence[int]) -> _Run:
            return _Run(self, rows, barriers, place)

        one = run([row])
        if one.left:
            one = run([row])
        two = run([row, row])
        return Cost(
            [_step(*pair, self.copies) for pair in zip(one.steps, two.steps, strict=True)],
            one.device,
            two.seconds / 2,
        )


def _step(one: Step, two: Step, copies: int) -> Step:
    """A row's step, from the memory of one and of two rows."""

    def more(first: int, second: int) -> int:
        return copies * max(second - first, 0)

    return replace(
        one,
        waiting=more(one.waiting, two.waiting),
        running=more(one.running, two.running),
        shown=more(one.shown, two.shown),
        reduced=two.reduced - one.reduced,
        forward=max(2 * one.running - two.running, 0),
    )


def streams(stage: Stage, barriers: Barriers) -> bool:
    """True if rows are reduced as they are observed, once targets have been sampled."""
    return bool(barriers.blocks) and stage.mask is None


class _Run:
    """One forward of the same row, repeated, under a meter that records what is alive at every
    pause."""

    def __init__(
        self,
        measure: Measure,
        rows: Sequence[int],
        barriers: Barriers | None,
        place: OffloadStore | None,
    ) -> None:
        self.steps: list[Step] = []
        self.device = torch.device("cpu") if place is None else place.device
        self._measure, self._meter = measure, MemoryMeter()
        self._narrow = barriers is not None
        self._keeps = barriers is None or not streams(measure.stage, barriers)
        self._groups: dict[Group, str] = {}
        self._level: list[Observation] = []
        self._solved = 0
        self._offload = None if place is None else ActivationOffload(place)
        stage, lockstep = measure.stage, measure.lockstep
        batch = MicroBatch(
            lambda: stage.run(rows, 1),
            [stage.concept_ids[row] for row in rows],
            1,
            self,
            pause=self._pause,
            choice=TokenSampling(rows, measure.limit, 0),
            conditions=[stage.costliest_condition] * len(rows) if stage.conditions else (),
        )
        with ExitStack() as stack:
            stack.enter_context(lockstep.in_barriers(barriers or Barriers()))
            stack.enter_context(self._meter)
            if self._offload is not None:
                stack.enter_context(self._offload)
                self._offload.turn(0)
            wait_for(self.device)
            started = time.perf_counter()
            lockstep.run(batch)
            wait_for(self.device)
            self.seconds = time.perf_counter() - started
            self.steps.append(Step("", running=self._meter.peak))
        self._level.clear()

    @property
    def left(self) -> int:
        """Bytes that the forward made and that are still alive."""
        return self._meter.live

    def observe(self, shown: Observation) -> None:
        """Keep what a site's solve will read until then, as in a sweep."""
        self.device, meter = shown.inputs.device, self._meter
        before, length = (meter.live, meter.peak), shown.site.length(shown.outputs)
        if self._narrow:
            shown = shown.gathered()
        tensors = (shown.inputs, shown.outputs, shown.stream)
        held = sum(t.numel() * t.element_size() for t in tensors if t is not None)
        if any(other.inputs is shown.inputs for other in self._level):
            held -= shown.inputs.numel() * shown.inputs.element_size()
        others = shown.alive - {shown.group}
        beside = [site for group, site in self._groups.items() if group in others]
        reduced = shown.rows * self._reduced(shown)
        shares = shown.group in self._groups
        self.steps.append(
            Step(
                shown.name,
                shown=held,
                reduced=reduced,
                beside=tuple(beside),
                shares=shares,
                length=length,
            )
        )
        self._groups[shown.group] = shown.name
        self._level.append(shown)
        if not self._keeps:  # it is reduced here
            meter.peak = max(before[1], before[0] + reduced)

    def _pause(self, _: str) -> None:
        meter, offload = self._meter, self._offload
        if not self._keeps:
            self._level.clear()
        running, waiting = meter.peak, meter.live
        if offload is not None:
            offload.rest()
            waiting = meter.live + offload.away
        level = slice(self._solved, None)
        self.steps[level] = [
            replace(step, waiting=waiting, running=running) for step in self.steps[level]
        ]
        self._solved = len(self.steps)
        if offload is not None:
            offload.turn(0)
        self._level.clear()
        meter.peak = meter.live

    def _reduced(self, shown: Observation) -> int:
        """Tokens of a row in the moments' precision, plus the conversion from the model's; for a
        convolution, patches of all its tokens are made first."""
        (out, width), size = shown.site.shape, shown.inputs.element_size()
        limit, itemsize = self._measure.limit, self._measure.itemsize
        length = shown.site.length(shown.outputs)
        tokens = length if limit is None else min(length, limit(width))
        patches = length * width * size if shown.inputs.numel() < length * width else 0
        made = width * (size + itemsize) + out * (2 * size + 3 * itemsize)
        return patches + tokens * made


def _longest(stage: Stage) -> int:
    if stage.lengths is not None:
        return max(range(len(stage.lengths)), key=stage.lengths.__getitem__)
    if stage.mask is None:
        return 0
    lengths = [0] * len(stage.concept_ids)
    for site in (stage.sites[0], stage.sites[-1]):  # an encoder's and a decoder's
        for row in range(len(lengths)):
            mask = stage.mask(site, [row])
            lengths[row] += 0 if mask is None else int(mask.sum())
    return lengths.index(max(lengths))
