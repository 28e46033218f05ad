"""Memory of a stage: bytes by number of rows, rows at once, and where rows wait.

In a sweep the peak is at one of its sites: while rows run there and all others wait, or while it is
solved. Otherwise the moments of all sites exist at once, and no row waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..hosts.protocol import Stage
from ..solve.problem import MemoryEstimate
from .measure import Cost, Step
from .strategies import Strategy


@dataclass(frozen=True)
class MemoryLimits:
    """Bytes that may be used on the device, and additionally on the host."""

    device: int
    host: int = 0


@dataclass(frozen=True)
class Footprint:
    """The memory of ``stage`` beyond the model with a ``strategy``: ``fixed`` bytes, ``sites`` for
    moments and solves, and a ``cost`` per row, or ``parked`` for a row that waits in host memory.
    ``waits`` says that all rows wait (a sweep). With ``sampled``, only that many rows wait with
    their observed tensors; the others are reduced as they run."""

    stage: Stage
    strategy: Strategy
    cost: Cost
    parked: Cost | None
    sites: Mapping[str, MemoryEstimate]
    fixed: int = 0
    waits: bool = True
    sampled: int = 0

    def bytes_of(self, rows: int, at_once: int, on_device: int | None = None) -> int:
        """Bytes for ``rows`` rows, ``at_once`` per forward, with that many of the rows waiting on
        the device (None: all)."""
        at_once = min(at_once, rows)
        peaks = self._swept(rows, at_once, on_device) if self.waits else self._streamed(at_once)
        return self.fixed + max(peaks)

    def host_bytes(self, rows: int, on_device: int | None) -> int:
        """Bytes of host memory for the rows that do not wait on the device."""
        if self.parked is None or on_device is None:
            return 0
        away = rows - on_device
        shown = max(sum(s.shown for s in level) for level in self._of_barriers(self.cost.steps))
        return away * self.parked.waiting + min(self.sampled, away) * shown

    def _swept(self, rows: int, at_once: int, on_device: int | None) -> Iterator[int]:
        """Bytes at every moment that may be the peak. Running rows may or may not have left the
        previous barrier. Observed tensors of ``sampled`` rows wait at their level; those of other
        rows are reduced while they run."""
        there = rows if on_device is None else on_device
        parked = self.cost if on_device is None or self.parked is None else self.parked
        sampled = min(self.sampled, rows)
        before = left = 0
        levels = map(self._of_barriers, (self.cost.steps, parked.steps))
        for steps, offs in zip(*levels, strict=True):
            step, off = steps[-1], offs[-1]
            sites = [(some, self.sites[some.site]) for some in steps if some.site in self.sites]
            kept = sum(site.kept - site.shared * some.shares for some, site in sites)
            shown = sum(some.shown for some in steps)
            running = [(there * max(before, step.waiting), kept if sampled else 0)]
            if sampled:
                # They run first; the last one's observed tensors count towards its running memory.
                gone = there * before + min(sampled, there) * max(step.waiting - before, 0)
                running.append((gone, max(min(sampled, there) - at_once, 0) * shown + kept))
            for others, extra in running:
                if there >= at_once:
                    rest = others * (there - at_once) // there
                    yield rest + at_once * step.running + step.forward + left + extra
                if there < rows:
                    yield others + at_once * off.running + off.forward + left + extra
            before, waiting = step.waiting, there * step.waiting
            if sampled and sites:
                waiting += sampled * shown if sampled == rows else 0
                shared = self._beside(step)
                yield waiting + kept + max(site.solve for _, site in sites) + shared
                left = max(site.left for _, site in sites) + shared
                continue
            for some, site in sites:
                read, shared = at_once * some.shown if there < rows else 0, self._beside(some)
                most = max(at_once * some.reduced, site.solve)
                yield waiting + read + site.kept + most + shared
                left = site.left + shared

    def _beside(self, step: Step) -> int:
        """Bytes left over from sites whose inputs are still alive."""
        return sum(self.sites[site].left for site in step.beside if site in self.sites)

    def _of_barriers(self, steps: Sequence[Step]) -> list[list[Step]]:
        """The last one of its own."""
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
            most = max(step.running, step.waiting + step.reduced if step.site else 0)
            yield kept + at_once * most + step.forward
