"""Memory of a stage: the measured cost of a row, and bytes by number of rows.

One row runs, then the same row twice, pausing as in a sweep with any strategy. The second row's
addition is the cost of a row; the rest is a forward's fixed cost (weights that are cast or moved to
the device). In a sweep the peak is at one of its sites: while rows run there and all others wait,
or while it is solved. Otherwise the moments of all sites exist at once, and no row waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..activations.activation_offload import ActivationOffload
from ..activations.host_pool import HostPool
from ..activations.lockstep import Lockstep
from ..activations.memory import MemoryMeter
from ..activations.micro_batch import MicroBatch
from ..activations.tokens import Group, Observation, TokenSampling
from ..activations.trace import Barriers
from ..hosts.protocol import Stage
from ..solve.problem import MemoryEstimate


@dataclass(frozen=True)
class Strategy:
    """Rows pause at the end of each of the ``barriers`` (None: at every site). If it ``offloads`` a
    device, rows wait in host memory, at ``bits`` bits (None: unchanged). A sweep takes ``slower``
    times as long as with the first strategy."""

    name: str = ""
    slower: float = 1.0
    barriers: Barriers | None = field(default=None, repr=False)
    offloads: torch.device | None = None
    bits: int | None = None


ON_DEVICE = Strategy("waiting on the device")


@dataclass
class Step:
    """The step of a row, with all its copies, to ``site``, the last one to the model's end (site
    ""): bytes that it holds there (``waiting``), its peak on the way (``running``), copies of its
    tensors that are reduced later (``shown``), and what a forward of any number of rows takes on
    the way. The inputs of the sites ``beside`` are still alive there; for a site that ``shares``,
    the moments of its inputs already exist."""

    site: str
    waiting: int = 0
    running: int = 0
    shown: int = 0
    forward: int = 0
    beside: Sequence[str] = ()
    shares: bool = False


@dataclass(frozen=True)
class Measure:
    """A measurement of the longest row of ``stage``. At most ``limit(width)`` of its tokens count
    at a site with that many inputs (None: all), in moments of ``itemsize`` bytes."""

    stage: Stage
    lockstep: Lockstep
    copies: int
    limit: Callable[[int], int] | None = None
    itemsize: int = 4

    def row(self, strategy: Strategy = ON_DEVICE, place: HostPool | None = None) -> list[Step]:
        """The steps of a row with a ``strategy``; if that offloads, it waits in ``place``. The
        first run casts changes to the model's dtype, and loads weights that are offloaded as a
        whole model. Both stay on the device and belong to no row, so a run that leaves something
        behind does not count."""
        row = longest(self.stage)
        steps, meter = self._forward(strategy, place, [row])
        if meter.live:
            steps, _ = self._forward(strategy, place, [row])
        of_two, _ = self._forward(strategy, place, [row, row])
        for step, two in zip(steps, of_two, strict=True):
            step.forward = max(2 * step.running - two.running, 0)
            step.waiting = self.copies * max(two.waiting - step.waiting, 0)
            step.running = self.copies * max(two.running - step.running, 0)
            step.shown = self.copies * max(two.shown - step.shown, 0)
        return steps

    def _forward(
        self, strategy: Strategy, place: HostPool | None, rows: Sequence[int]
    ) -> tuple[list[Step], MemoryMeter]:
        """The steps of one forward of the same row, repeated, and the meter that records what is
        alive at every pause."""
        stage, meter, steps = self.stage, MemoryMeter(), list[Step]()
        groups: dict[Group, str] = {}
        level: list[Observation] = []
        offload = None if place is None else ActivationOffload(place)
        solved = 0

        def observe(shown: Observation) -> None:
            """Reduce what a site sees, or keep copies of it, as in a sweep."""
            before, held = (meter.live, meter.peak), 0
            if strategy.barriers is not None:
                shown = shown.gathered()
                tensors = [shown.outputs] if shown.stream is None else [shown.outputs, shown.stream]
                if not any(_same_memory(other.inputs, shown.inputs) for other in level):
                    tensors.append(shown.inputs)
                held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                level.append(shown)
            others = shown.alive - {shown.group}
            beside = [site for group, site in groups.items() if group in others]
            shares = shown.group in groups
            steps.append(Step(shown.name, shown=held, beside=beside, shares=shares))
            groups[shown.group] = shown.name
            reduced = len(rows) * self._reduced(shown) // self.copies
            meter.peak = max(before[1], before[0] + reduced)

        def pause(_: str) -> None:
            nonlocal solved
            level.clear()
            running, waiting = meter.peak, meter.live
            if offload is not None:
                offload.rest()
                waiting = meter.live + offload.away
            for step in steps[solved:]:
                step.waiting, step.running = waiting, running
            solved = len(steps)
            if offload is not None:
                offload.turn(0)
            meter.peak = meter.live

        batch = MicroBatch(
            partial(stage.forward, stage.at(rows), 1),
            [replace(row, loads=stage.costliest_loads) for row in stage.at(rows)],
            1,
            observe,
            pause,
            sampling=TokenSampling(rows, self.limit, 0),
        )
        with ExitStack() as stack:
            stack.enter_context(self.lockstep.in_barriers(strategy.barriers or Barriers()))
            stack.enter_context(meter)
            if offload is not None:
                stack.enter_context(offload)
                offload.turn(0)
            self.lockstep.run(batch)
            steps.append(Step("", running=meter.peak))
        level.clear()
        return steps, meter

    def _reduced(self, shown: Observation) -> int:
        """Tokens of a row in the moments' precision, plus the conversion from the model's; for a
        convolution, patches of all its tokens are made first."""
        (out, width), size, length = shown.site.shape, shown.inputs.element_size(), shown.length
        tokens = length if self.limit is None else min(length, self.limit(width))
        patches = length * width * size if shown.inputs.numel() < length * width else 0
        made = width * (size + self.itemsize) + out * (2 * size + 3 * self.itemsize)
        return patches + tokens * made


def _same_memory(one: Tensor, other: Tensor) -> bool:
    same_storage = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return same_storage and one.storage_offset() == other.storage_offset()


def forward_of(stage: Stage) -> Step:
    """A plain forward as one step of its longest row; what the row leaves for later stages is
    ``waiting``. The first run may leave something behind that belongs to no row."""
    row = longest(stage)
    measured: list[tuple[int, int]] = []
    for rows in ([row], [row], [row, row]):
        with MemoryMeter() as meter:
            stage.forward(stage.at(rows), 1)
        measured.append((meter.peak, meter.live))
    _, (peak, left), (peak_of_two, _) = measured
    each = max(peak_of_two - peak, 0)
    return Step("", left if stage.feeds_next else 0, each, forward=max(peak - each, 0))


def longest(stage: Stage) -> int:
    """The row that takes the most memory."""
    if stage.mask is None:
        return max(range(len(stage.rows)), key=lambda row: stage.rows[row].length)
    lengths = [0] * len(stage.rows)
    for site in (stage.sites[0], stage.sites[-1]):  # an encoder's and a decoder's
        for row in range(len(lengths)):
            mask = stage.mask(site, stage.at([row]))
            lengths[row] += 0 if mask is None else int(mask.sum())
    return lengths.index(max(lengths))


@dataclass(frozen=True)
class Footprint:
    """The memory of ``stage`` beyond the model with a ``strategy``: ``fixed`` bytes, ``sites`` for
    moments and solves, and the ``steps`` of every row. In a sweep all rows wait, and ``sampled`` of
    them with copies of their observed tensors, until all of these can be reduced; the others' are
    reduced as they run. None: no sweep."""

    stage: Stage
    strategy: Strategy
    steps: Sequence[Step]
    sites: Mapping[str, MemoryEstimate]
    fixed: int = 0
    sampled: int | None = None

    def bytes_of(self, rows: int, at_once: int) -> int:
        """Bytes on the device for ``rows`` rows, ``at_once`` per forward."""
        at_once = min(at_once, rows)
        if self.sampled is None:
            kept = sum(site.kept for site in self.sites.values())
            solves = [site.solve for site in self.sites.values()]
            runs = [at_once * step.running + step.forward for step in self.steps]
            return self.fixed + kept + max(solves + runs)
        # Of every moment that may be the peak: while rows run to a level, of which others may or
        # may not have left the previous one, and while the level is solved.
        peaks: list[int] = []
        before = left = 0
        there = self.strategy.offloads is None  # where rows wait
        for steps in self._levels():
            step, others = steps[-1], rows - at_once
            sites = [(at, self.sites[at.site]) for at in steps if at.site in self.sites]
            kept = sum(site.kept - site.shared * at.shares for at, site in sites)
            # Sampled rows run first; the last one's copies count towards its running memory.
            ahead = max(step.waiting - before, 0) + sum(at.shown for at in steps)
            first = others * before + min(self.sampled, others) * ahead
            waiting = max(others * max(before, step.waiting), first) if there else 0
            peaks.append(waiting + at_once * step.running + step.forward + left + kept)
            before = step.waiting
            if sites:
                shared = sum(self.sites[s].left for s in step.beside if s in self.sites)
                solve = max(site.solve for _, site in sites)
                peaks.append(rows * before * there + kept + solve + shared)
                left = max(site.left for _, site in sites) + shared
        return self.fixed + max(peaks)

    def host_bytes(self, rows: int) -> int:
        """Bytes of host memory in which ``rows`` rows wait."""
        if self.strategy.offloads is None:
            return 0
        shown = max(sum(step.shown for step in level) for level in self._levels())
        waiting = max(step.waiting for step in self.steps)
        return rows * waiting + min(self.sampled or 0, rows) * shown

    def _levels(self) -> list[list[Step]]:
        """The steps by level; those after the last barrier form their own."""
        barriers, levels = self.strategy.barriers, list[list[Step]]([[]])
        for step in self.steps:
            levels[-1].append(step)
            if barriers is None or barriers.ends_at(step.site):
                levels.append([])
        return [level for level in levels if level]
