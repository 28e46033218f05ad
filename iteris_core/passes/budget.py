"""A memory budget, kept: how many rows run at once, and how many of a stage run at all.

The budget is what the user allows, or what the host says there is room for. Before a stage runs,
its longest row runs under a meter of live tensors. In a sweep every row waits at each site, with
what it holds there (skip connections, states); the rows that run at once hold more, up to their
peak; and the moments and the solve of the largest site come on top, and all merged changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..activations.lockstep import Lockstep, MicroBatch
from ..activations.meter import MemoryMeter
from ..activations.processes import Processes
from ..activations.tokens import Observation
from ..errors import IterisError
from ..hosts.protocol import Stage
from ..lora import SiteChanges
from ..solve.problem import Bytes
from .batches import Batching
from .job import Job

_log = logging.getLogger(__name__)


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


BytesOf = Callable[[str, bool], Bytes]
"""``bytes_of(site, sweep)``: what a method takes there."""


def plan(
    job: Job,
    stage: Stage,
    lockstep: Lockstep,
    batching: Batching,
    bytes_of: BytesOf,
    *,
    copies: int,
    sweep: bool,
) -> tuple[Stage, Batching]:
    """``stage`` and ``batching`` so that the job's memory budget is kept.

    In a sweep only the largest site's moments are there at once, else those of all sites of the
    stage.
    """
    budget = job.memory_budget
    if budget is None or not stage.sites:
        return stage, batching
    cost = measure_row(stage, lockstep, copies)
    fixed = changes_bytes(job.changes) + lockstep.cast_bytes
    fixed += reduction_bytes([bytes_of(site, sweep) for site in stage.sites], at_once=not sweep)
    need = Need(stage, cost, fixed, job.processes, sweep)
    wanted = need.bytes_of(len(stage.owners), batching.rows)
    if budget == "free":
        sharing = job.processes.size if _device_of(job).type == "cpu" else 1
        # All processes have to leave out the same rows.
        budget = job.processes.least(job.host.room(wanted) // sharing)
    else:
        job.host.room(min(wanted, budget))
    made, stage = plan_stage(need, budget, batching.rows)
    job.ran.plan.append(str(made))
    if made.rows < made.offered:
        _log.warning("Not enough memory for all rows: %s", made)
    job.tick(f"plan: {made}", 1, 1)
    return stage, replace(batching, rows=made.at_once)


def reduction_bytes(sites: Sequence[Bytes], *, at_once: bool) -> int:
    """What the moments and solves of ``sites`` take at most: the largest site's, or, with
    ``at_once``, the moments of all and the largest solve."""
    if not at_once:
        return max(site.kept + site.solve for site in sites)
    return sum(site.kept for site in sites) + max(site.solve for site in sites)


def changes_bytes(changes: Mapping[str, SiteChanges]) -> int:
    """What the merged changes take at most, float32 factors of Σ r_i."""
    return sum(4 * sum(site.shape) * site.rank for site in changes.values())


def _device_of(job: Job) -> torch.device:
    module = next(iter(job.host.sites().values()))
    return next(module.parameters()).device


def measure_row(stage: Stage, lockstep: Lockstep, copies: int) -> RowCost:
    """Run one copy of the longest row of ``stage``; the others take as much, or less.

    Changes are cast to the model's dtype when a site is first reached, and stay so: no row holds
    them, so that a run in which that happened is not the one that counts.
    """
    before = lockstep.cast_bytes
    cost = _measured(stage, lockstep, copies)
    return cost if lockstep.cast_bytes == before else _measured(stage, lockstep, copies)


def _measured(stage: Stage, lockstep: Lockstep, copies: int) -> RowCost:
    row = _longest(stage)
    meter = MemoryMeter()
    probe = _Probe(meter)
    with meter:
        lockstep.run(MicroBatch(lambda: stage.run([row], 1), [stage.owners[row]], 1, probe))
    return RowCost(copies * probe.most, copies * meter.peak)


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


@dataclass(frozen=True)
class Need:
    """What ``stage`` needs beyond the model: ``fixed`` bytes for moments and solves, and a ``cost``
    for each row of this process. ``waits`` says that all rows wait at each site (a sweep)."""

    stage: Stage
    cost: RowCost
    fixed: int
    processes: Processes
    waits: bool

    @property
    def held(self) -> int:
        """Bytes of a row that waits."""
        return self.cost.waiting if self.waits else 0

    @property
    def extra(self) -> int:
        """Bytes that a row takes while it runs, beyond those of one that waits."""
        return max(self.cost.running - self.held, 1)

    def bytes_of(self, rows: int, at_once: int) -> int:
        """Bytes for ``rows`` rows of all processes, ``at_once`` a forward."""
        mine = rows if self.stage.feeds else -(-rows // self.processes.size)
        return self.fixed + mine * self.held + min(at_once, mine) * self.extra


def plan_stage(need: Need, budget: int, most: int) -> tuple[StagePlan, Stage]:
    """The largest plan of up to ``most`` rows at once that ``budget`` bytes allow, and the stage
    with the rows that it has left.

    Where even one row at once is too much because of those that wait, rows are left out, evenly
    over the concepts; a stage that a later one needs in full loses none. Raises
    :class:`IterisError` where a row for each concept is too much.
    """
    stage, size = need.stage, need.processes.size
    rows = offered = len(stage.owners)
    if need.bytes_of(rows, 1) > budget and not stage.feeds and need.held:
        rows = max((budget - need.fixed - need.extra) // need.held, 0) * size
    fewest = offered if stage.feeds else max(len(set(stage.owners)), size)
    if rows < fewest or need.bytes_of(rows, 1) > budget:
        raise IterisError(
            f"The {stage.name} needs at least {need.bytes_of(fewest, 1) / 2**30:.2f} GiB beyond "
            f"the model, and {budget / 2**30:.2f} GiB may be used; lower samples, timesteps or "
            "latent_size, or allow more memory."
        )
    kept = stage if rows >= offered else _fewer(stage, rows)
    rows = len(kept.owners)
    at_once = max(1, min(most, rows, (budget - need.bytes_of(rows, 0)) // need.extra))
    total = need.bytes_of(rows, at_once)
    return StagePlan(stage.name, len(stage.sites), rows, offered, at_once, total), kept


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
    mask, samples = stage.mask, stage.samples

    def run(some: Sequence[int], copies: int) -> None:
        stage.run([rows[row] for row in some], copies)

    def selected_mask(site: str, some: Sequence[int]) -> torch.Tensor | None:
        return mask(site, [rows[row] for row in some]) if mask is not None else None

    return replace(
        stage,
        owners=[stage.owners[row] for row in rows],
        run=run,
        mask=None if mask is None else selected_mask,
        kinds=None if stage.kinds is None else [stage.kinds[row] for row in rows],
        lengths=None if stage.lengths is None else [stage.lengths[row] for row in rows],
        samples=None if samples is None else max(1, samples * len(rows) // len(stage.owners)),
    )


class _Probe:
    """An observer that notes what is alive when a site is reached."""

    def __init__(self, meter: MemoryMeter) -> None:
        self._meter = meter
        self.most = 0

    def observe(self, shown: Observation) -> None:
        self.most = max(self.most, self._meter.live)
