"""Memory of a stage: bytes for so many rows, so many at once, waiting here or there.

In a sweep the peak is at one of its sites: while rows run there, beside all others that wait, or
while it is solved. Else the moments of all sites are there at once, and no row waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..activations.processes import Processes
from ..hosts.protocol import Stage
from ..solve.problem import Bytes
from .measure import Cost, Limit, Step
from .strategies import Strategy


@dataclass(frozen=True)
class MemoryLimits:
    """Bytes of the device, and of the host beside it, that may be used."""

    device: int
    host: int = 0


@dataclass(frozen=True)
class Footprint:
    """The memory of ``stage`` beyond the model by a ``strategy``: ``fixed`` bytes in any case,
    ``sites`` for moments and solves, and a ``cost`` for each row of this process, or ``parked`` if
    it waits in host memory. ``waits`` says that all rows wait (a sweep). With ``sampled`` only so
    many rows wait with what they have shown, and the others are reduced as they run. Of fewer rows
    more tokens count: up to ``limits(rows)`` (None: as many as when the cost was measured)."""

    stage: Stage
    strategy: Strategy
    cost: Cost
    parked: Cost | None
    sites: Mapping[str, Bytes]
    fixed: int = 0
    processes: Processes = field(default_factory=Processes)
    waits: bool = True
    sampled: int = 0
    limits: Callable[[int], Limit] | None = None

    def mine(self, rows: int) -> int:
        """This process's part."""
        return rows if self.stage.feeds_next else -(-rows // self.processes.size)

    def bytes_of(self, rows: int, at_once: int, on_device: int | None = None) -> int:
        """Bytes for ``rows`` rows of all processes, ``at_once`` a forward, of which so many of this
        process wait on the device (None: all)."""
        mine = self.mine(rows)
        at_once = min(at_once, mine)
        this = self._of_rows(rows)
        if not this.waits:
            return this.fixed + this._streamed(at_once)
        swept = this._by_barriers if this.sampled else this._swept
        return this.fixed + max(swept(mine, at_once, on_device))

    def host_bytes(self, rows: int, on_device: int | None) -> int:
        """Bytes of host memory of the rows that do not wait on the device."""
        this = self._of_rows(rows)
        if this.parked is None or on_device is None:
            return 0
        away = self.mine(rows) - on_device
        shown = max(
            sum(step.shown for step in level) for level in self._of_barriers(this.cost.steps)
        )
        return away * this.parked.waiting + min(self.sampled, away) * shown

    def _of_rows(self, rows: int) -> Footprint:
        """The same with the tokens that count of so many rows."""
        if self.limits is None or rows >= len(self.stage.concept_ids):
            return self
        limit, parked = self.limits(rows), self.parked
        return replace(
            self,
            cost=self._counting(self.cost, limit),
            parked=None if parked is None else self._counting(parked, limit),
        )

    def _counting(self, cost: Cost, limit: Limit) -> Cost:
        steps: list[Step] = []
        for level in self._of_barriers(cost.steps):
            counted = [step.counting(limit) for step in level]
            more = sum(step.copied for step in counted) - sum(step.copied for step in level)
            if cost.keeps:
                counted = [
                    replace(step, waiting=step.waiting + more, running=step.running + more)
                    for step in counted
                ]
            steps += counted
        return replace(cost, steps=steps)

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

    def _by_barriers(self, mine: int, at_once: int, on_device: int | None) -> Iterator[int]:
        """As :meth:`_swept`, where the rows of a level are reduced while others run to it."""
        there = mine if on_device is None else on_device
        parked = self.cost if on_device is None or self.parked is None else self.parked
        before = left = 0
        barriers = zip(
            self._of_barriers(self.cost.steps), self._of_barriers(parked.steps), strict=True
        )
        for steps, offs in barriers:
            step, off = steps[-1], offs[-1]
            step_before, held = before, max(before, step.waiting)
            before = step.waiting
            sites = [self.sites[some.site] for some in steps if some.site in self.sites]
            shares = [some.shares for some in steps if some.site in self.sites]
            kept = sum(
                site.kept - site.shared * shared for site, shared in zip(sites, shares, strict=True)
            )
            sampled = min(-(-self.sampled // self.processes.size), mine)
            kind = sum(some.shown for some in steps)
            # The sampled rows run first; what the last of them show is among what they run with.
            shown = max(min(sampled, there) - at_once, 0) * kind
            gone = there * step_before + min(sampled, there) * max(step.waiting - step_before, 0)
            for others, extra in ((gone, shown + kept), (there * held, kept)):
                on_top = left + extra + step.forward
                if there >= at_once:
                    yield others * (there - at_once) // there + at_once * step.running + on_top
                if there < mine:
                    yield others + at_once * off.running + on_top
            if sites:
                shared = sum(self.sites[s].left for s in step.beside if s in self.sites)
                waits = there * step.waiting + (sampled * kind if sampled == mine else 0)
                yield waits + kept + max(site.solve for site in sites) + shared
                left = max(site.left for site in sites) + shared

    def _of_barriers(self, steps: Sequence[Step]) -> list[list[Step]]:
        """The last one of its own."""
        barriers, found = self.strategy.barriers, list[list[Step]]([[]])
        for step in steps:
            found[-1].append(step)
            if barriers is None or barriers.ends_at(step.site):
                found.append([])
        return [level for level in found if level]

    def _streamed(self, at_once: int) -> int:
        steps = self.cost.steps
        running = [
            at_once * max(s.running, s.waiting + s.reduced if s.site else 0) + s.forward
            for s in steps
        ]
        solve = max((site.solve for site in self.sites.values()), default=0)
        return sum(site.kept for site in self.sites.values()) + max(solve, *running)
