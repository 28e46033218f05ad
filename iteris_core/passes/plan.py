"""The plan of a stage: the first strategy whose footprint fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..activations.oom_retry import halved
from ..errors import OutOfMemory
from ..hosts.protocol import Stage
from .batches import fewer, selected
from .footprint import Footprint, MemoryLimits
from .job import StageTiming
from .strategies import Strategy


@dataclass(frozen=True)
class Plan:
    """The plan of a stage: ``at_once`` rows at a time out of ``offered``, with a ``strategy``,
    using ``bytes`` of the ``budget`` beyond the model. If the strategy offloads, ``on_device`` rows
    wait on the device and the others in ``host_bytes`` of host memory, limited to ``host_limit``.
    The measurement has ``seen`` a row."""

    stage: Stage
    at_once: int
    strategy: Strategy
    offered: int = 0
    bytes: int = 0
    budget: float = math.inf
    on_device: int = 0
    host_bytes: int = 0
    host_limit: int = 0
    seen: StageTiming | None = None

    @property
    def rows(self) -> int:
        return len(self.stage.concept_ids)

    def __str__(self) -> str:
        rows = f"{self.rows} rows"
        if self.rows < self.offered:
            rows = f"{self.rows} of {self.offered} rows (the others do not fit)"
        parts = [
            f"{self.stage.name}: {rows}",
            f"{self.at_once} at once",
            self.strategy.name,
            f"{self.bytes / 2**30:.2f} of {self.budget / 2**30:.2f} GiB",
            f"{self.host_bytes / 2**30:.2f} GiB of host memory" if self.host_bytes else "",
        ]
        return ", ".join(filter(None, parts))

    def of(self, stage: Stage) -> Plan:
        """The same plan, with the same rows, for the planned ``stage`` made again."""
        if self.rows < self.offered:
            left, every = set(self.stage.rows or ()), stage.rows or range(self.offered)
            kept = selected(stage, [at for at, row in enumerate(every) if row in left])
            stage = replace(kept, samples=self.stage.samples)
        return replace(self, stage=stage)


class Planned(Exception):
    """Ends a preview: the ``plans`` of all stages are made."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        super().__init__("planned")
        self.plans = plans


def plan_stage(footprints: Sequence[Footprint], limits: MemoryLimits, most: int) -> Plan:
    """The first plan of up to ``most`` rows at once that fits into the ``limits``. ``footprints``
    are those of the strategies, fastest first.

    If none fits, rows are left out evenly over the concepts, except in a stage that a later one
    needs in full. Raises :class:`OutOfMemory` if even one row per concept does not fit.
    """
    stage = footprints[0].stage
    offered = len(stage.concept_ids)
    found = _first(footprints, limits, stage, most)
    if found is None:
        concepts = len(set(stage.concept_ids))

        def left(share: int) -> Stage:
            return fewer(stage, share * concepts)

        def fits(share: int) -> bool:
            return _first(footprints, limits, left(share), 1) is not None

        share = None if stage.feeds_next else _largest(fits, 1, offered // concepts)
        if share is None:
            raise _too_much(footprints, limits, offered if stage.feeds_next else concepts)
        found = _first(footprints, limits, left(share), most)
        assert found is not None
    return replace(found, offered=offered)


def _first(
    footprints: Sequence[Footprint], limits: MemoryLimits, stage: Stage, most: int
) -> Plan | None:
    plans = (_plan_of(footprint, limits, stage, most) for footprint in footprints)
    return next(filter(None, plans), None)


def _plan_of(footprint: Footprint, limits: MemoryLimits, stage: Stage, most: int) -> Plan | None:
    """With one strategy: as many rows at once as fit, with as many as possible waiting there."""
    rows = len(stage.concept_ids)
    most = min(most, rows)

    def plan(at_once: int, on_device: int | None = None) -> Plan:
        return Plan(
            stage,
            at_once,
            footprint.strategy,
            bytes=footprint.bytes_of(rows, at_once, on_device),
            budget=limits.device,
            on_device=on_device or 0,
            host_bytes=footprint.host_bytes(rows, on_device),
            host_limit=limits.host,
        )

    if footprint.parked is None:
        at_once = _largest(lambda n: footprint.bytes_of(rows, n) <= limits.device, 1, most)
        return None if at_once is None else plan(at_once)
    for count in halved(most):
        kept = _largest(
            lambda kept: footprint.bytes_of(rows, count, kept) <= limits.device,  # noqa: B023
            0,
            rows - 1,
        )
        if kept is None:
            continue
        kept = kept // count * count  # whole forwards
        if footprint.host_bytes(rows, kept) <= limits.host:
            return plan(count, kept)
    return None


def _too_much(footprints: Sequence[Footprint], limits: MemoryLimits, fewest: int) -> OutOfMemory:
    def least(of: Footprint) -> int:
        return of.bytes_of(fewest, 1, None if of.parked is None else 0)

    smallest = min(footprints, key=least)
    tried = ""
    if smallest.parked is not None:
        waiting, free = _size(smallest.host_bytes(fewest, 0)), _size(limits.host)
        tried = f", with rows waiting in {waiting} of host memory, with {free} free"
    what = (
        "all rows, because later stages need them"
        if smallest.stage.feeds_next
        else "one row per concept"
    )
    return OutOfMemory(
        f"The {smallest.stage.name} needs at least {_size(least(smallest))} beyond the model for "
        f"{what}{tried}, but only {_size(limits.device)} may be used; lower samples, timesteps or "
        "latent_size, or allow more memory."
    )


def _size(count: float) -> str:
    """Bytes as text, in the largest unit of which there is at least a tenth."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit / 10:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} bytes"


def _largest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The largest number that ``fits``, assuming all smaller ones do."""
    if most < least or not fits(least):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least
