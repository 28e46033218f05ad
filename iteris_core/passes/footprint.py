"""Memory of a stage: the measured cost of a row, and a bound on bytes by number of rows.

One row runs, then the same row twice, pausing as in a sweep with any strategy. The second row's
addition is the cost of a row; the rest is a forward's fixed cost (weights that are cast or moved to
the device). A sweep takes at most what all its waiting rows hold anywhere, what the rows of one
forward take at most, and the largest moments and solve. These need not meet, which leaves room for
moments that later sites share. Otherwise the moments of all sites exist at once, and no row waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..activations.activation_offload import ActivationOffload
from ..activations.host_pool import HostPool
from ..activations.lockstep import Lockstep
from ..activations.memory import MemoryMeter
from ..activations.micro_batch import MicroBatch
from ..activations.tokens import Observation, TokenSampling
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


@dataclass(frozen=True)
class RowMemory:
    """Bytes of a row with all its copies, at most: while it waits (``waiting``), on its way from
    one pause to the next (``running``), and in copies of its tensors that are reduced later
    (``shown``); and what a ``forward`` of any number of rows takes. ``solving`` is what the
    moments and the solve between two pauses take."""

    waiting: int = 0
    running: int = 0
    shown: int = 0
    forward: int = 0
    solving: int = 0


@dataclass
class _Level:
    """The ``sites`` from one pause to the next, and bytes as in :class:`RowMemory`."""

    sites: list[str] = field(default_factory=list[str])
    waiting: int = 0
    running: int = 0
    shown: int = 0


@dataclass(frozen=True)
class Measure:
    """A measurement of the longest row of ``stage``, whose ``sites`` take so much. At most
    ``limit(width)`` of its tokens count at a site with that many inputs (None: all), in moments of
    ``itemsize`` bytes."""

    stage: Stage
    lockstep: Lockstep
    copies: int
    sites: Mapping[str, MemoryEstimate]
    limit: Callable[[int], int] | None = None
    itemsize: int = 4

    def row(self, strategy: Strategy = ON_DEVICE, place: HostPool | None = None) -> RowMemory:
        """A row's memory with a ``strategy``; if that offloads, it waits in ``place``. The first
        run casts changes to the model's dtype, and loads weights that are offloaded as a whole
        model. Both stay on the device and belong to no row, so a run that leaves something behind
        does not count."""
        row = longest(self.stage)
        levels, meter = self._forward(strategy, place, [row])
        if meter.live:
            levels, _ = self._forward(strategy, place, [row])
        of_two, _ = self._forward(strategy, place, [row, row])
        pairs, solving = list(zip(levels, of_two, strict=True)), [0]
        for level in levels:
            known = [self.sites[site] for site in level.sites if site in self.sites]
            if known:
                solving.append(sum(of.kept for of in known) + max(of.solve for of in known))
        return RowMemory(
            waiting=self.copies * max(0, *(two.waiting - one.waiting for one, two in pairs)),
            running=self.copies * max(0, *(two.running - one.running for one, two in pairs)),
            shown=self.copies * max(0, *(two.shown - one.shown for one, two in pairs)),
            forward=max(0, *(2 * one.running - two.running for one, two in pairs)),
            solving=max(solving),
        )

    def _forward(
        self, strategy: Strategy, place: HostPool | None, rows: Sequence[int]
    ) -> tuple[list[_Level], MemoryMeter]:
        """The levels of one forward of the same row, repeated, and the meter that records what is
        alive at every pause."""
        stage, meter, levels = self.stage, MemoryMeter(), [_Level()]
        held: list[Observation] = []
        offload = None if place is None else ActivationOffload(place)

        def observe(shown: Observation) -> None:
            """Reduce what a site sees, or keep copies of it, as in a sweep."""
            before = meter.live, meter.peak
            levels[-1].sites.append(shown.name)
            if strategy.barriers is not None:
                shown = shown.gathered()
                tensors = [shown.outputs] if shown.stream is None else [shown.outputs, shown.stream]
                if not any(_same_memory(other.inputs, shown.inputs) for other in held):
                    tensors.append(shown.inputs)
                levels[-1].shown += sum(of.numel() * of.element_size() for of in tensors)
                held.append(shown)
            reduced = len(rows) * self._reduced(shown) // self.copies
            meter.peak = max(before[1], before[0] + reduced)

        def pause(_: str) -> None:
            held.clear()
            levels[-1].running, levels[-1].waiting = meter.peak, meter.live
            if offload is not None:
                offload.rest()
                levels[-1].waiting = meter.live + offload.away
                offload.turn(0)
            levels.append(_Level())
            meter.peak = meter.live

        batch = MicroBatch(
            partial(stage.forward, stage.at(rows), 1),
            [stage.rows[row].concept for row in rows],
            1,
            observe,
            pause,
            sampling=TokenSampling(rows, self.limit, 0),
            conditions=[stage.costliest_condition] * len(rows),
        )
        with ExitStack() as stack:
            stack.enter_context(self.lockstep.in_barriers(strategy.barriers or Barriers()))
            stack.enter_context(meter)
            if offload is not None:
                stack.enter_context(offload)
                offload.turn(0)
            self.lockstep.run(batch)
            levels[-1].running = meter.peak
        held.clear()
        return levels, meter

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


def forward_of(stage: Stage) -> RowMemory:
    """The longest row's memory in a plain forward; what it leaves for later stages is ``waiting``.
    The first run may leave something behind that belongs to no row."""
    row = longest(stage)
    measured: list[tuple[int, int]] = []
    for rows in ([row], [row], [row, row]):
        with MemoryMeter() as meter:
            stage.forward(stage.at(rows), 1)
        measured.append((meter.peak, meter.live))
    _, (peak, left), (peak_of_two, _) = measured
    each = max(peak_of_two - peak, 0)
    return RowMemory(left if stage.feeds_next else 0, each, forward=max(peak - each, 0))


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
    moments and solves, and what a ``row`` takes. In a sweep all rows wait, and ``sampled`` of them
    with copies of their observed tensors, until all of these can be reduced; the others' are
    reduced as they run. None: no sweep."""

    stage: Stage
    strategy: Strategy
    row: RowMemory
    sites: Mapping[str, MemoryEstimate]
    fixed: int = 0
    sampled: int | None = None

    def bytes_of(self, rows: int, at_once: int) -> int:
        """Bytes on the device for ``rows`` rows, ``at_once`` per forward."""
        at_once, row = min(at_once, rows), self.row
        running = at_once * row.running + row.forward
        if self.sampled is None:
            kept = sum(site.kept for site in self.sites.values())
            return self.fixed + kept + max(running, *(of.solve for of in self.sites.values()))
        waiting = 0 if self.strategy.offloads is not None else self._waiting(rows - at_once)
        return self.fixed + waiting + running + row.solving

    def host_bytes(self, rows: int) -> int:
        """Bytes of host memory in which ``rows`` rows wait."""
        return 0 if self.strategy.offloads is None else self._waiting(rows)

    def _waiting(self, rows: int) -> int:
        return rows * self.row.waiting + min(self.sampled or 0, rows) * self.row.shown
