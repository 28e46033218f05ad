"""What a stage needs: bytes and seconds for so many rows, so many at once, waiting here or there.

In a sweep the peak is at one of its sites: while rows run there, beside all others that wait, or
while it is solved. Else the moments of all sites are there at once, and no row waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..activations.blocks import Levels
from ..activations.processes import Processes
from ..hosts.protocol import Stage
from ..solve.problem import Bytes
from .measure import Cost


@dataclass(frozen=True)
class Room:
    """Bytes of the device, and of the host beside it, that may be used."""

    device: int
    host: int = 0


@dataclass(frozen=True)
class Need:
    """What ``stage`` needs beyond the model, one way or another: ``fixed`` bytes in any case,
    ``sites`` for moments and solves, and a ``cost`` for each row of this process, or ``parked`` if
    it waits in host memory. ``waits`` says that all rows wait (a sweep), at the end of each of the
    ``levels`` (None: at every site). The way is called ``name``."""

    stage: Stage
    cost: Cost
    parked: Cost | None
    sites: Mapping[str, Bytes]
    fixed: int = 0
    processes: Processes = field(default_factory=Processes)
    waits: bool = True
    passes: int = 1
    name: str = ""
    levels: Levels | None = None

    def mine(self, rows: int) -> int:
        """This process's part."""
        return rows if self.stage.feeds else -(-rows // self.processes.size)

    def bytes_of(self, rows: int, at_once: int, on_device: int | None = None) -> int:
        """Bytes for ``rows`` rows of all processes, ``at_once`` a forward, of which so many of this
        process wait on the device (None: all)."""
        mine = self.mine(rows)
        at_once = min(at_once, mine)
        if not self.waits:
            return self.fixed + self._streamed(at_once)
        return self.fixed + max(self._swept(mine, at_once, on_device))

    def host_bytes(self, rows: int, on_device: int | None) -> int:
        """What rows take of the host's memory that do not wait on the device."""
        if self.parked is None or on_device is None:
            return 0
        return (self.mine(rows) - on_device) * self.parked.waiting

    def seconds_of(self, rows: int, at_once: int, on_device: int | None = None) -> float:
        """About so long, but for what solving takes."""
        mine = self.mine(rows)
        there = mine if on_device is None else on_device
        run = _seconds(self.cost, there, at_once)
        if self.parked is not None:
            run += _seconds(self.parked, mine - there, at_once)
        return self.passes * run

    def _swept(self, mine: int, at_once: int, on_device: int | None) -> Iterator[int]:
        """At every moment that may take most. Rows that run have left the site before, or not."""
        there = mine if on_device is None else on_device
        parked = self.cost if on_device is None or self.parked is None else self.parked
        before = left = 0
        for step, off in zip(self.cost.steps, parked.steps, strict=True):
            held = max(before, step.waiting)
            before = step.waiting
            if there >= at_once:
                yield (there - at_once) * held + at_once * step.running + step.forward + left
            if there < mine:
                yield there * held + at_once * off.running + off.forward + left
            at_site = self.sites.get(step.site)
            if at_site is not None:
                read = at_once * step.shown if there < mine else 0
                most = max(at_once * step.reduced, at_site.solve)
                shared = sum(self.sites[s].left for s in step.beside if s in self.sites)
                yield there * step.waiting + read + at_site.kept + most + shared
                left = at_site.left + shared

    def _streamed(self, at_once: int) -> int:
        steps = self.cost.steps
        running = [
            at_once * max(s.running, s.waiting + s.reduced if s.site else 0) + s.forward
            for s in steps
        ]
        solve = max((site.solve for site in self.sites.values()), default=0)
        return sum(site.kept for site in self.sites.values()) + max(solve, *running)


def _seconds(cost: Cost, rows: int, at_once: int) -> float:
    return -(-rows // max(at_once, 1)) * cost.seconds + rows * cost.more
