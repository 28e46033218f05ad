"""What a row of a stage costs, measured: bytes at every site, and seconds.

One row runs, and the same row twice; what the second one adds is what a row takes, and the rest is
what a forward takes whatever its rows (weights that are cast or brought to the device).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..activations.host_memory import wait_for
from ..activations.lockstep import Lockstep
from ..activations.meter import MemoryMeter, is_apart
from ..activations.micro_batch import MicroBatch
from ..activations.parking import Parking, Place
from ..activations.tokens import Group, Observation
from ..hosts.protocol import Stage

Limit = Callable[[int], int] | None
"""How many of a row's tokens count at a site that is so many inputs wide; None: all."""


@dataclass(frozen=True)
class Step:
    """A row's way to ``site``, from the site before: bytes that it holds there (``waiting``), at
    most on the way (``running``), of its tensors that the solve reads (``shown``) and that are made
    of them (``reduced``); ``forward`` is taken on the way however many rows run. The inputs of the
    sites ``beside`` are still alive there, so that others may share their moments."""

    site: str
    waiting: int = 0
    running: int = 0
    shown: int = 0
    reduced: int = 0
    forward: int = 0
    beside: Sequence[str] = ()


@dataclass(frozen=True)
class Cost:
    """Of one row, all its copies: its ``steps`` in order, the last one to the model's end (site
    ""). A forward takes ``seconds``, and ``more`` for every row. ``device`` is where its tensors
    are."""

    steps: Sequence[Step]
    device: torch.device
    seconds: float = 0.0
    more: float = 0.0

    @property
    def waiting(self) -> int:
        """At most, at any site."""
        return max(step.waiting for step in self.steps)


@dataclass(frozen=True)
class Measure:
    """What is measured: the longest row of ``stage``, of which ``limit`` tokens count, with moments
    of ``itemsize`` bytes."""

    stage: Stage
    lockstep: Lockstep
    copies: int
    limit: Limit = None
    itemsize: int = 4

    def row(self, place: Place | None = None) -> Cost:
        """What a row costs that waits on the device, or in ``place`` at every site.

        Changes are cast to the model's dtype when a site is first reached, and stay so: no row
        holds them, so that a run in which that happened is not the one that counts.
        """
        row, before = _longest(self.stage), self.lockstep.cast_bytes
        one = _Run(self, [row], place)
        if self.lockstep.cast_bytes != before:
            one = _Run(self, [row], place)
        two = _Run(self, [row, row], place)
        seconds = one.seconds, two.seconds
        if is_apart(one.device):  # where a meter takes longer than the forward
            timed = [_Run(self, rows, place, metered=False) for rows in ([row], [row, row])]
            seconds = timed[0].seconds, timed[1].seconds
        return Cost(
            [_step(*pair, self.copies) for pair in zip(one.steps, two.steps, strict=True)],
            one.device,
            max(2 * seconds[0] - seconds[1], 0.0),
            self.copies * min(max(seconds[1] - seconds[0], 0.0), seconds[0]),
        )


def _step(one: Step, two: Step, copies: int) -> Step:
    """Of a row, from what one and two of them took."""

    def more(first: int, second: int) -> int:
        return copies * max(second - first, 0)

    return Step(
        one.site,
        more(one.waiting, two.waiting),
        more(one.running, two.running),
        more(one.shown, two.shown),
        two.reduced - one.reduced,
        max(2 * one.running - two.running, 0),
        one.beside,
    )


class _Run:
    """One forward of so many times the same row under a meter, and an observer that notes what is
    alive when a site is reached."""

    def __init__(
        self, measure: Measure, rows: Sequence[int], place: Place | None, *, metered: bool = True
    ) -> None:
        self.steps: list[Step] = []
        self.device = torch.device("cpu") if place is None else place.device
        self._measure, self._meter = measure, MemoryMeter()
        self._groups: dict[Group, str] = {}
        self._parking = None if place is None else Parking(place)
        stage = measure.stage
        owners = [stage.owners[row] for row in rows]
        with ExitStack() as stack:
            if metered:
                stack.enter_context(self._meter)
            if self._parking is not None:
                stack.enter_context(self._parking)
                self._parking.turn(0)
            wait_for(self.device)
            started = time.perf_counter()
            measure.lockstep.run(MicroBatch(lambda: stage.run(rows, 1), owners, 1, self))
            wait_for(self.device)
            self.seconds = time.perf_counter() - started
            self.steps.append(Step("", running=self._meter.peak))

    def observe(self, shown: Observation) -> None:
        meter = self._meter
        self.device = shown.inputs.device
        tensors = (shown.inputs, shown.outputs, shown.stream)
        held = sum(t.numel() * t.element_size() for t in tensors if t is not None)
        others = shown.alive - {shown.group}
        beside = [site for group, site in self._groups.items() if group in others]
        reduced = shown.rows * self._reduced(shown)
        self.steps.append(
            Step(shown.name, meter.live, meter.peak, held, reduced, beside=tuple(beside))
        )
        self._groups[shown.group] = shown.name
        if self._parking is not None:
            self._parking.rest()
            self._parking.turn(0)
        meter.peak = meter.live

    def _reduced(self, shown: Observation) -> int:
        """Tokens of a row in the moments' precision, on their way there in the model's; patches of
        a convolution are made of all its tokens first."""
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
    lengths = [0] * len(stage.owners)
    for site in (stage.sites[0], stage.sites[-1]):  # an encoder's and a decoder's
        for row in range(len(lengths)):
            mask = stage.mask(site, [row])
            lengths[row] += 0 if mask is None else int(mask.sum())
    return lengths.index(max(lengths))
