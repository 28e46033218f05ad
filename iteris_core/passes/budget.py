"""A memory budget, kept: how many rows run at once, and how many of a stage run at all.

Before a stage runs, its longest row runs under a :class:`..memory.MemoryMeter`. In a sweep every
row waits at each site, with what it holds there (skip connections, states); the rows that run at
once hold more, up to their peak; and the moments and the solve of the largest site come on top, and
all merged changes.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

import torch

from ..activations.lockstep import Lockstep, MicroBatch
from ..activations.meter import MemoryMeter, free_memory
from ..activations.processes import Shards
from ..activations.tokens import Visit
from ..errors import IterisError
from ..hosts.protocol import Stage
from ..solve.memory import changes_bytes, statistics_bytes
from .batches import Batching
from .job import Job

_KEPT_FREE = 0.1  # of the memory that is free: for what allocators round up and libraries take


@dataclass(frozen=True)
class StagePlan:
    """What a stage will take: ``at_once`` rows of ``rows`` at a time, out of ``offered``;
    ``bytes`` beyond the model."""

    stage: str
    sites: int
    rows: int
    offered: int
    at_once: int
    bytes: int

    def __str__(self) -> str:
        rows = f"{self.rows} rows"
        if self.rows < self.offered:
            rows = f"{self.rows} of {self.offered} rows (the others do not fit)"
        return (
            f"{self.stage}: {self.sites} sites, {rows}, {self.at_once} at once, "
            f"{self.bytes / 2**30:.2f} GiB"
        )


@dataclass(frozen=True)
class RowCost:
    """Bytes of one row, all its copies: while it waits at a site, and at most while it runs."""

    waiting: int
    running: int


def plan(
    job: Job,
    stage: Stage,
    lockstep: Lockstep,
    batching: Batching,
    *,
    copies: int,
    sweep: bool,
    before: Set[str] = frozenset(),
) -> tuple[Stage, Batching]:
    """``stage`` and ``batching`` so that the job's memory budget is kept. ``before`` are sites of
    earlier stages whose moments are still there."""
    if job.memory_budget is None or not stage.sites:
        return stage, batching
    budget = job.memory_budget
    if budget == "free":
        device = _device_of(job)
        sharing = job.shards.size if device.type == "cpu" else 1
        # All processes have to leave out the same rows.
        budget = job.shards.least(round((1 - _KEPT_FREE) * free_memory(device)) // sharing)
    fixed = changes_bytes(job.references) + statistics_bytes(
        job.references,
        {*stage.sites, *before},
        repairs=job.repairs,
        cross=batching.cross,
        itemsize=batching.itemsize,
        at_once=not sweep,
    )
    made, stage = plan_stage(
        stage,
        measure_row(stage, lockstep, copies),
        fixed,
        budget,
        batching.rows,
        job.shards,
        waits=sweep,
    )
    job.plan.append(str(made))
    job.tick(f"plan: {made}", 1, 1)
    return stage, replace(batching, rows=made.at_once)


def _device_of(job: Job) -> torch.device:
    assert job.host is not None
    module = next(iter(job.host.sites().values()))
    return next(module.parameters()).device


def measure_row(stage: Stage, lockstep: Lockstep, copies: int) -> RowCost:
    """Run one copy of the longest row of ``stage``; others are padded to it, or as long."""
    row = _longest(stage)
    meter = MemoryMeter()
    probe = _Probe(meter)
    with meter:
        lockstep.run(MicroBatch(lambda: stage.run([row], 1), [stage.owners[row]], 1, probe))
    return RowCost(copies * probe.most, copies * meter.peak)


def _longest(stage: Stage) -> int:
    if stage.mask is None:
        return 0
    lengths = [0] * len(stage.owners)
    for site in (stage.sites[0], stage.sites[-1]):  # an encoder's and a decoder's
        for row in range(len(lengths)):
            mask = stage.mask(site, [row])
            lengths[row] += 0 if mask is None else int(mask.sum())
    return lengths.index(max(lengths))


def plan_stage(
    stage: Stage,
    cost: RowCost,
    fixed: int,
    budget: int,
    most: int,
    shards: Shards,
    *,
    waits: bool,
) -> tuple[StagePlan, Stage]:
    """The largest plan of up to ``most`` rows at once that ``budget`` bytes allow, and the stage
    with the rows that it has left.

    ``fixed`` is what moments and solves take. Where even one row at once is too much because of
    those that wait, rows are left out, evenly over the concepts; a stage that a later one needs in
    full loses none. Raises :class:`IterisError` where a row for each concept is too much.
    """
    offered = len(stage.owners)
    held = cost.waiting if waits else 0
    extra = max(cost.running - held, 1)

    def bytes_of(rows: int, at_once: int) -> int:
        mine = -(-rows // shards.size) if not stage.feeds else rows
        return fixed + mine * held + min(at_once, mine) * extra

    rows = offered
    if bytes_of(rows, 1) > budget and not stage.feeds and held:
        rows = max((budget - fixed - extra) // held, 0) * shards.size
    concepts = len(set(stage.owners))
    if rows < max(concepts, shards.size) or bytes_of(rows, 1) > budget:
        least = fixed + concepts * held + extra
        raise IterisError(
            f"The {stage.name} needs at least {least / 2**30:.2f} GiB beyond the model, and "
            f"{budget / 2**30:.2f} GiB may be used; lower the latent size, or allow more."
        )
    kept = stage if rows >= offered else _fewer(stage, rows)
    rows = len(kept.owners)
    at_once = max(1, min(most, rows, (budget - bytes_of(rows, 0)) // extra))
    made = StagePlan(stage.name, len(stage.sites), rows, offered, at_once, bytes_of(rows, at_once))
    return made, kept


def _fewer(stage: Stage, count: int) -> Stage:
    """``count`` rows of ``stage`` at most, as many of each concept, evenly over its rows."""
    by_concept: dict[int, list[int]] = {}
    for row, owner in enumerate(stage.owners):
        by_concept.setdefault(owner, []).append(row)
    share = count // len(by_concept)
    rows: list[int] = []
    for mine in by_concept.values():
        keep = min(share, len(mine))
        rows += [mine[i * len(mine) // keep] for i in range(keep)]
    return _selected(stage, rows)


def _selected(stage: Stage, rows: Sequence[int]) -> Stage:
    mask = stage.mask

    def run(some: Sequence[int], copies: int) -> None:
        stage.run([rows[row] for row in some], copies)

    def mask_of(site: str, some: Sequence[int]) -> torch.Tensor | None:
        assert mask is not None
        return mask(site, [rows[row] for row in some])

    owners = [stage.owners[row] for row in rows]
    return replace(stage, owners=owners, run=run, mask=None if mask is None else mask_of)


class _Probe:
    """A visitor that notes what is alive when a site is reached."""

    def __init__(self, meter: MemoryMeter) -> None:
        self._meter = meter
        self.most = 0

    def visit(self, visit: Visit) -> None:
        self.most = max(self.most, self._meter.live)
