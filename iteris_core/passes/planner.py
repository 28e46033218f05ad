"""Keeps a memory budget: how many rows run at once, where others wait, and how many run at all.

The budget is the user's limit, or the host's free memory. Before a stage runs, its longest row is
measured (:mod:`.footprint`), and the first strategy that fits is used. If memory runs out anyway,
because other programs took it, the next ones are tried.

In a sweep rows wait on the device at every site, which needs most memory, or block by block
(:mod:`..activations.barriers`) with only the inputs of a small or large block. If the device has
memory of its own, they then wait in host memory; as a last resort they are rounded there to 8 or 4
bits. All but this gives the same result.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

from ..activations.host_pool import HostPool, free_host
from ..activations.lockstep import Lockstep
from ..activations.memory import halved, is_apart, is_out_of_memory
from ..activations.micro_batch import MicroBatch, Observer
from ..activations.trace import Barriers, ExecutionTrace, with_replayable
from ..errors import OutOfMemory
from ..hosts.protocol import Stage
from ..solve.choose import THRESHOLDS, Thresholds
from ..solve.problem import StageSolver
from .batches import ExecutionConfig, Schedule, fewer, limit_of, sampled_rows
from .changes import changes_of
from .footprint import ON_DEVICE, Footprint, Measure, Strategy
from .job import Job, Run

_log = logging.getLogger(__name__)

BLOCKS = {"small blocks": 1.4, "large blocks": 2.1}
"""Sizes of :attr:`..solve.choose.Thresholds.blocks`, and the measured slowdown of a sweep
(docs/decisions.md)."""
_IN_HOST, _BLOCKS_IN_HOST = 1.4, 1.25  # times longer
_PACKED = {8: 1.1, 4: 1.2}
"""Bits at which rows wait, and the estimated slowdown of a sweep."""

IN_HOST = "waiting in host memory"


def ladder(stage: Stage, lockstep: Lockstep, thresholds: Thresholds) -> Iterator[Strategy]:
    """All strategies after the first, :data:`ON_DEVICE`; a row or two run to find them. Without
    blocks that can be replayed, rows wait in host memory at the end of every level."""
    found, last = find(stage, lockstep), None
    offloads = found.device if is_apart(found.device) else None
    place, times = (IN_HOST, _BLOCKS_IN_HOST) if offloads else (ON_DEVICE.name, 1.0)
    for most, (size, slower) in zip(thresholds.blocks, BLOCKS.items(), strict=False):
        barriers = replayable(stage, lockstep, found.barriers(most), thresholds)
        if barriers.blocks and (last is None or barriers != last.barriers):
            last = Strategy(f"{place}, by {size}", slower * times, barriers, offloads)
            yield last
    if offloads is None:
        return
    if last is None:
        last = Strategy(IN_HOST, _IN_HOST, found.barriers(), offloads)
        yield last
    for bits, slower in _PACKED.items():
        name = f"{last.name}, at {bits} bits"
        yield replace(last, name=name, slower=slower * last.slower, bits=bits)


def find(stage: Stage, lockstep: Lockstep) -> ExecutionTrace:
    """The barriers of a stage, found with its first row."""
    trace = ExecutionTrace()
    with trace:
        lockstep.run(_first_row(stage, trace.observe))
    return trace


def replayable(
    stage: Stage, lockstep: Lockstep, barriers: Barriers, thresholds: Thresholds = THRESHOLDS
) -> Barriers:
    """``barriers`` with the blocks that can be replayed."""
    run = partial(lockstep.run, _first_row(stage))
    return with_replayable(barriers, run, thresholds.replay_error)


def _first_row(stage: Stage, observer: Observer | None = None) -> MicroBatch:
    forward = partial(stage.forward, stage.rows[:1], 1)
    return MicroBatch(forward, stage.rows[:1], 1, observer)


@dataclass(frozen=True)
class Plan:
    """``at_once`` rows of a stage at a time out of ``offered``, with a ``strategy``, using
    ``bytes`` of the ``budget`` beyond the model, and ``host_bytes`` of host memory."""

    stage: Stage
    at_once: int
    strategy: Strategy
    offered: int = 0
    bytes: int = 0
    budget: float = math.inf
    host_bytes: int = 0

    @property
    def rows(self) -> int:
        return len(self.stage.rows)

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
            left = {row.number for row in self.stage.rows}
            rows = [row for row in stage.rows if row.number in left]
            stage = replace(stage, rows=rows, samples=self.stage.samples)
        return replace(self, stage=stage)


def outlook_of(job: Job, plans: Sequence[Plan]) -> str:
    """What a merge takes and gives besides its time, in a line: rows that do not fit, and at most
    the rank and the size of the file."""
    offered = sum(plan.offered for plan in plans)
    short = offered - sum(plan.rows for plan in plans)
    ranks = {site: job.largest_rank(some) for site, some in job.changes.items()}
    included = changes_of(job.included) if job.included else {}
    more = {site: some.rank for site, some in included.items()}
    shapes = {site: some.shape for site, some in (*included.items(), *job.changes.items())}
    # Shared out, no layer is limited, but the file is.
    limit = job.rank if isinstance(job.rank, int) else math.inf
    size = sum(
        2 * (min(ranks.get(site, 0), limit) + more.get(site, 0)) * sum(shape)
        for site, shape in shapes.items()
    )
    largest = max(ranks.get(site, 0) + more.get(site, 0) for site in shapes)
    parts = [
        f"{short} of {offered} rows left out" if short else "no row left out" if offered else "",
        f"rank at most {largest}",
        f"file at most {size / 2**20:.1f} MiB as float16",
    ]
    return ", ".join(filter(None, parts))


def planned(
    run: Run,
    stage: Stage,
    solver: StageSolver,
    batching: ExecutionConfig,
    *,
    schedule: Schedule,
    before: Sequence[Stage] = (),
) -> Plan:
    """A plan within the run's memory budget, beside what the stages ``before`` leave, for as many
    rows as fit. Without a budget, the fastest strategy for all."""
    job, lockstep, sweep, offered = run.job, run.lockstep, schedule.sweep, len(stage.rows)
    fastest = ON_DEVICE if sweep else Strategy()
    if job.memory_budget is None or not stage.sites:
        return Plan(stage, job.at_once(batching.rows, stage=stage.name), fastest, offered)
    left = left_by(job, (*before, stage), schedule.copies)
    # The merged changes, at most: float32 factors of rank Σ r_i.
    merged = sum(4 * sum(site.shape) * site.rank for site in lockstep.changes.values())
    sites = {site: solver.bytes(site, sweep) for site in stage.sites}
    while True:
        limit, itemsize = limit_of(stage, batching), solver.dtype.itemsize
        measure = Measure(stage, lockstep, schedule.copies, limit, itemsize)
        steps = measure.row()
        sampled = len(sampled_rows(stage, batching.thresholds)) if sweep else None
        fixed = left + lockstep.cast_bytes + merged
        footprints = [Footprint(stage, fastest, steps, sites, fixed, sampled)]
        wanted = footprints[0].bytes_of(len(stage.rows), batching.rows)
        available, host_limit = allowed(job, wanted), 0
        if sweep and wanted > available:
            footprints += others(footprints[0], measure, batching.thresholds)
            host_limit = free_host()
        made = plan_stage(footprints, available, batching.rows, host_limit)
        all_fit = made.rows == len(stage.rows)
        if all_fit or not stage.spatial or batching.row_tokens != "enough":
            break
        stage = made.stage  # with fewer rows, more tokens of each may count
    if made.bytes < wanted:
        job.host.free_memory(made.bytes)  # weights evicted for more than this come back
    made = replace(made, offered=offered)
    if made.rows < offered:
        _log.warning(
            "Not enough memory for all rows: %s; lower samples, timesteps or latent_size, or allow "
            "more memory",
            str(made),  # records may be kept, and with the plan its rows
        )
    job.tick(f"plan: {made}", 0, 0, str(made))
    return made


def left_by(job: Job, stages: Sequence[Stage], copies: int) -> int:
    """The bytes that all rows of ``stages``, in so many ``copies``, leave for later stages."""
    each = {one.stage.name: copies * one.forward.waiting for one in job.trace.stages}
    return sum(each.get(stage.name, 0) * len(stage.rows) for stage in stages)


def allowed(job: Job, wanted: int) -> int:
    """The bytes that the most recent stage may use, after the host has tried to free ``wanted``."""
    budget, free = job.memory_budget, job.host.free_memory
    if isinstance(budget, int):
        free(min(wanted, budget))
        return budget
    return free(wanted)


def others(footprint: Footprint, measure: Measure, thresholds: Thresholds) -> Iterator[Footprint]:
    """``footprint`` with the other strategies."""
    for strategy in ladder(footprint.stage, measure.lockstep, thresholds):
        if strategy.offloads is None:
            steps = measure.row(strategy)
        else:
            with closing(HostPool(strategy.offloads, bits=strategy.bits)) as place:
                steps = measure.row(strategy, place)
        yield replace(footprint, strategy=strategy, steps=steps)


def plan_stage(footprints: Sequence[Footprint], limit: int, most: int, host_limit: int = 0) -> Plan:
    """The first plan of up to ``most`` rows at once that fits into ``limit`` bytes of the device,
    and ``host_limit`` of the host. ``footprints`` are those of the strategies, fastest first. If
    none fits, rows are left out evenly over the concepts, except in a stage that a later one needs
    in full. Raises :class:`OutOfMemory` if even one row per concept does not fit."""
    stage = footprints[0].stage
    offered, concepts = len(stage.rows), len({row.concept for row in stage.rows})

    def first(most: int, share: int | None = None) -> Plan | None:
        """With that many rows of each concept (None: all)."""
        some = stage if share is None else fewer(stage, share * concepts)
        rows = len(some.rows)
        for of in footprints:
            waiting = of.host_bytes(rows)
            for at_once in range(min(most, rows), 0, -1) if waiting <= host_limit else ():
                size = of.bytes_of(rows, at_once)
                if size <= limit:
                    return Plan(some, at_once, of.strategy, offered, size, limit, waiting)
        return None

    made = first(most)
    if made is None and not stage.feeds_next:
        shares = range(1, offered // concepts + 1)
        share = bisect_left(shares, True, key=lambda share: first(1, share) is None)
        made = first(most, share) if share else None
    if made is not None:
        return made
    fewest, what = concepts, "one row per concept"
    if stage.feeds_next:
        fewest, what = offered, "all rows, because later stages need them"
    smallest = min(footprints, key=lambda of: of.bytes_of(fewest, 1))
    needed, waiting = smallest.bytes_of(fewest, 1), smallest.host_bytes(fewest)
    in_host = ""
    if waiting:
        in_host = (
            f", with rows waiting in {_gib(waiting)} of host memory, with {_gib(host_limit)} free"
        )
    raise OutOfMemory(
        f"The {stage.name} needs at least {_gib(needed)} beyond the model for {what}{in_host}, but "
        f"only {_gib(limit)} may be used; lower samples, timesteps or latent_size, or allow more "
        "memory."
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def attempts(
    plan: Plan, lockstep: Lockstep, thresholds: Thresholds, *, sweep: bool
) -> Iterator[Plan]:
    """``plan``, followed by plans that use less in case memory runs out: in a sweep the other
    strategies, then half as many rows at once, down to one."""
    yield plan
    strategies: list[Strategy] = []
    if sweep:
        try:  # to find them needs a row to run, for which memory may be missing too
            strategies.extend(ladder(plan.stage, lockstep, thresholds))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
    for strategy in strategies:
        if strategy.slower > plan.strategy.slower:
            plan = replace(plan, strategy=strategy)
            yield plan
    rows = min(plan.at_once, plan.rows)
    yield from (replace(plan, at_once=some) for some in halved(rows) if some < rows)


def complaint(said: str, tried: Sequence[Plan]) -> str:
    """The message if memory did not suffice for any of the plans ``tried``."""
    ways: list[str] = []
    for plan in tried:
        rows = f"{plan.at_once} rows at once" if plan.at_once > 1 else "one row at once"
        ways.append(", ".join(filter(None, (rows, plan.strategy.name))))
    return (
        f"Out of memory in the {tried[0].stage.name} ({said}). Tried: {'; '.join(ways)}. Lower "
        "samples or timesteps (fewer rows), or latent_size (smaller ones), "
        "or free memory elsewhere. The model is unchanged."
    )
