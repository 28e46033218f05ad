"""Memory of a stage: the measured cost of a row, and bytes by number of rows.

One row runs, then the same row twice, pausing as in a sweep with any strategy. The second row's
addition is the cost of a row; the rest is a forward's fixed cost (weights that are cast or moved to
the device). In a sweep the peak is at one of its sites: while rows run there and all others wait,
or while it is solved. Otherwise the moments of all sites exist at once, and no row waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch

from ..activations.activation_offload import ActivationOffload
from ..activations.barriers import Barriers
from ..activations.host_pool import HostPool
from ..activations.lockstep import Lockstep
from ..activations.memory import MemoryMeter
from ..activations.micro_batch import MicroBatch
from ..activations.token_sampling import TokenSampling
from ..activations.tokens import Group, Observation
from ..hosts.protocol import Stage
from ..solve.problem import MemoryEstimate


@dataclass(frozen=True)
class Strategy:
    """Rows pause at the end of each of the ``barriers`` (None: at every site). If it ``offloads`` a
    device, rows without space there wait in host memory, at ``bits`` bits (None: unchanged). A
    sweep takes ``slower`` times as long as with the first strategy."""

    name: str = ""
    slower: float = 1.0
    barriers: Barriers | None = field(default=None, repr=False)
    offloads: torch.device | None = None
    bits: int | None = None


@dataclass
class Step:
    """A row's step to ``site``: bytes that it holds there (``waiting``), its peak on the way
    (``running``), copies of its tensors that are reduced later (``shown``), and what a forward of
    any number of rows takes on the way. The inputs of the sites ``beside`` are still alive there;
    for a site that ``shares``, the moments of its inputs already exist."""

    site: str
    waiting: int = 0
    running: int = 0
    shown: int = 0
    forward: int = 0
    beside: Sequence[str] = ()
    shares: bool = False


@dataclass(frozen=True)
class Cost:
    """The cost of one row with all its copies: its ``steps`` in order, the last one to the model's
    end (site ""). ``device`` is where its tensors are."""

    steps: Sequence[Step]
    device: torch.device

    @property
    def waiting(self) -> int:
        """The maximum over all sites."""
        return max(step.waiting for step in self.steps)


@dataclass(frozen=True)
class Measure:
    """A measurement of the longest row of ``stage``. At most ``limit(width)`` of its tokens count
    at a site with that many inputs (None: all), in moments of ``itemsize`` bytes."""

    stage: Stage
    lockstep: Lockstep
    copies: int
    limit: Callable[[int], int] | None = None
    itemsize: int = 4

    def row(
        self,
        barriers: Barriers | None = None,
        place: HostPool | None = None,
        bits: int | None = None,
    ) -> Cost:
        """The cost of a row that waits on the device, or in ``place`` at so many ``bits``, at the
        end of each of the ``barriers`` (None: at every site). The first run casts changes to the
        model's dtype, and loads weights that are offloaded as a whole model. Both stay on the
        device and belong to no row, so a run that leaves something behind does not count."""
        row = _longest(self.stage)
        offload = None if place is None else partial(ActivationOffload, place, bits)
        measured = partial(_MeasuredForward, self, barriers, offload)
        one = measured([row])
        if one.meter.live:
            one = measured([row])
        two = measured([row, row])
        for step, both in zip(one.steps, two.steps, strict=True):
            step.forward = max(2 * step.running - both.running, 0)
            step.waiting = self.copies * max(both.waiting - step.waiting, 0)
            step.running = self.copies * max(both.running - step.running, 0)
            step.shown = self.copies * max(both.shown - step.shown, 0)
        return Cost(one.steps, one.device)


class _MeasuredForward:
    """One forward of the same row, repeated, under a meter that records what is alive at every
    pause."""

    def __init__(
        self,
        measure: Measure,
        barriers: Barriers | None,
        offload: Callable[[], ActivationOffload] | None,
        rows: Sequence[int],
    ) -> None:
        self.steps: list[Step] = []
        self.meter = MemoryMeter()
        self.device = torch.device("cpu")
        self._measure = measure
        self._narrow = barriers is not None
        self._groups: dict[Group, str] = {}
        self._level: list[Observation] = []
        self._solved = 0
        self._offload = offload() if offload is not None else None
        stage, lockstep = measure.stage, measure.lockstep
        batch = MicroBatch(
            partial(stage.run, rows, 1),
            [stage.concept_ids[row] for row in rows],
            1,
            self,
            pause=self._pause,
            choice=TokenSampling(rows, measure.limit, 0),
            conditions=[stage.costliest_condition] * len(rows) if stage.conditions else (),
        )
        with ExitStack() as stack:
            stack.enter_context(lockstep.in_barriers(barriers or Barriers()))
            stack.enter_context(self.meter)
            if self._offload is not None:
                stack.enter_context(self._offload)
                self._offload.turn(0)
            lockstep.run(batch)
            self.steps.append(Step("", running=self.meter.peak))
        self._level.clear()

    def observe(self, shown: Observation) -> None:
        """Reduce what a site sees, or keep copies of it, as in a sweep."""
        self.device, meter, held = shown.inputs.device, self.meter, 0
        before = meter.live, meter.peak
        if self._narrow:
            shown = shown.gathered()
            tensors = (shown.inputs, shown.outputs, shown.stream)
            held = sum(t.numel() * t.element_size() for t in tensors if t is not None)
            if any(other.inputs is shown.inputs for other in self._level):
                held -= shown.inputs.numel() * shown.inputs.element_size()
            self._level.append(shown)
        others = shown.alive - {shown.group}
        beside = [site for group, site in self._groups.items() if group in others]
        shares = shown.group in self._groups
        self.steps.append(Step(shown.name, shown=held, beside=tuple(beside), shares=shares))
        self._groups[shown.group] = shown.name
        reduced = shown.rows * self._reduced(shown) // self._measure.copies
        meter.peak = max(before[1], before[0] + reduced)

    def _pause(self, _: str) -> None:
        meter, offload = self.meter, self._offload
        self._level.clear()
        running, waiting = meter.peak, meter.live
        if offload is not None:
            offload.rest()
            waiting = meter.live + offload.away
        for step in self.steps[self._solved :]:
            step.waiting, step.running = waiting, running
        self._solved = len(self.steps)
        if offload is not None:
            offload.turn(0)
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


@dataclass(frozen=True)
class MemoryLimits:
    """Bytes that may be used on the device, and additionally on the host."""

    device: int
    host: int = 0


@dataclass(frozen=True)
class Footprint:
    """The memory of ``stage`` beyond the model with a ``strategy``: ``fixed`` bytes, ``sites`` for
    moments and solves, and a ``cost`` per row, or ``parked`` for a row that waits in host memory.
    In a sweep all rows wait, and ``sampled`` of them with copies of their observed tensors, until
    all of these can be reduced; the others' are reduced as they run. None: no sweep."""

    stage: Stage
    strategy: Strategy
    cost: Cost
    parked: Cost | None
    sites: Mapping[str, MemoryEstimate]
    fixed: int = 0
    sampled: int | None = None

    def bytes_of(self, rows: int, at_once: int, on_device: int | None = None) -> int:
        """Bytes for ``rows`` rows, ``at_once`` per forward, with that many of the rows waiting on
        the device (None: all)."""
        at_once = min(at_once, rows)
        sweeps = self.sampled is not None
        peaks = self._swept(rows, at_once, on_device) if sweeps else self._streamed(at_once)
        return self.fixed + max(peaks)

    def host_bytes(self, rows: int, on_device: int) -> int:
        """Bytes of host memory for the rows that do not wait on the device."""
        if self.parked is None:
            return 0
        away = rows - on_device
        shown = max(sum(s.shown for s in level) for level in self._of_barriers(self.cost.steps))
        return away * self.parked.waiting + min(self.sampled or 0, away) * shown

    def _swept(self, rows: int, at_once: int, on_device: int | None) -> Iterator[int]:
        """Bytes at every moment that may be the peak: while rows run to a level, of which others
        may or may not have left the previous one, and while the level is solved."""
        there = rows if on_device is None else on_device
        parked = self.parked or self.cost
        sampled = min(self.sampled or 0, there)
        before = left = 0
        levels = map(self._of_barriers, (self.cost.steps, parked.steps))
        for steps, offs in zip(*levels, strict=True):
            step, off = steps[-1], offs[-1]
            sites = [(some, self.sites[some.site]) for some in steps if some.site in self.sites]
            kept = sum(site.kept - site.shared * some.shares for some, site in sites)
            shown = sum(some.shown for some in steps)
            # Sampled rows run first; the last one's copies count towards its running memory.
            first = there * before + sampled * max(step.waiting - before, 0)
            first += max(sampled - at_once, 0) * shown
            for others in (there * max(before, step.waiting), first):
                if there >= at_once:
                    rest = others * (there - at_once) // there
                    yield rest + at_once * step.running + step.forward + left + kept
                if there < rows:
                    yield others + at_once * off.running + off.forward + left + kept
            before = step.waiting
            if sites:
                shared = sum(self.sites[s].left for s in step.beside if s in self.sites)
                yield there * before + kept + max(site.solve for _, site in sites) + shared
                left = max(site.left for _, site in sites) + shared

    def _of_barriers(self, steps: Sequence[Step]) -> list[list[Step]]:
        """The steps by level; those after the last barrier form their own."""
        barriers, found = self.strategy.barriers, list[list[Step]]([[]])
        for step in steps:
            found[-1].append(step)
            if barriers is None or barriers.ends_at(step.site):
                found.append([])
        return [level for level in found if level]

    def _streamed(self, at_once: int) -> Iterator[int]:
        kept = sum(site.kept for site in self.sites.values())
        yield from (kept + site.solve for site in self.sites.values())
        for step in self.cost.steps:
            yield kept + at_once * step.running + step.forward
