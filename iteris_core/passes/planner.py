"""Keeps a memory budget: how many rows run at once, where others wait, and how many run at all.

The budget is the user's limit, or the host's free memory. Before a stage runs, its longest row is
measured (:mod:`.measure`). In a sweep every row waits at each site, on the device or in host
memory, in addition to the moments and the solve of one site; otherwise there are the moments of all
sites. The first strategy that fits is used. If memory runs out anyway, because other programs took
it, the next ones are tried.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

import torch

from ..activations.host_pool import HostPool, OffloadStore
from ..activations.lockstep import Lockstep
from ..activations.meter import is_apart, is_out_of_memory
from ..activations.oom_retry import halved
from ..hosts.protocol import Stage
from ..lora import SiteChanges
from ..solve.choose import Thresholds
from ..solve.problem import StageSolver
from .batches import ExecutionConfig, Schedule, limit_of, sampled_rows
from .footprint import Footprint, MemoryLimits
from .job import Run, SiteCost, StageTiming
from .measure import Cost, Measure, streams
from .plan import Plan, plan_stage
from .strategies import ON_DEVICE, Strategy, free_host, ladder

_log = logging.getLogger(__name__)


def planned(
    run: Run, stage: Stage, solver: StageSolver, batching: ExecutionConfig, *, schedule: Schedule
) -> Plan:
    """A plan within the run's memory budget; without a budget, the fastest strategy."""
    budget = run.job.memory_budget
    if budget is None or not stage.sites:
        strategy = ON_DEVICE if schedule.sweep else Strategy()
        return Plan(stage, batching.rows, strategy, len(stage.concept_ids))
    made, cost = _fitting(run, stage, solver, batching, schedule, budget)
    job, steps = run.job, (step for step in cost.steps if step.site)
    reached = {s.site: SiteCost(job.changes[s.site].shape, s.length) for s in steps}
    seen = StageTiming(made.stage, job.calibration, reached, cost.seconds, cost.device)
    made = replace(made, offered=len(stage.concept_ids), seen=seen)
    if made.rows < made.offered:
        _log.warning(
            "Not enough memory for all rows: %s; lower samples, timesteps or latent_size, or allow "
            "more memory",
            made,
        )
    job.tick(f"plan: {made}", 0, 0, str(made))
    return made


def _fitting(
    run: Run,
    stage: Stage,
    solver: StageSolver,
    batching: ExecutionConfig,
    schedule: Schedule,
    budget: int | Literal["free"],
) -> tuple[Plan, Cost]:
    """The plan for as many rows as fit, and the measured cost of one. With fewer rows, more tokens
    per row may count, so a reduced stage is measured again."""
    lockstep, room, sweep = run.lockstep, run.job.host.free_memory, schedule.sweep
    limit, itemsize = limit_of(stage, batching), solver.dtype.itemsize
    measure = Measure(stage, lockstep, schedule.copies, limit, itemsize)
    cost = measure.row()
    footprint = Footprint(
        stage,
        ON_DEVICE if sweep else Strategy(),
        cost,
        None,
        {site: solver.bytes(site, sweep) for site in stage.sites},
        changes_bytes(lockstep.changes, cost.device) + lockstep.cast_bytes,
        sweep,
    )
    wanted = footprint.bytes_of(len(stage.concept_ids), batching.rows)
    available = budget
    if available == "free":
        available = room(wanted)
    else:
        room(min(wanted, available))
    limits, footprints = MemoryLimits(available), [footprint]
    if sweep and wanted > available:
        with ExitStack() as stack:
            place = None
            if is_apart(cost.device):
                limits = MemoryLimits(available, free_host())
                place = HostPool(cost.device, limits.host)
                stack.callback(place.close)
            footprints += others(footprint, measure, place, batching)
    made = plan_stage(footprints, limits, batching.rows)
    if made.rows < made.offered and stage.spatial and batching.row_tokens == "enough":
        return _fitting(run, made.stage, solver, batching, schedule, budget)
    if made.bytes < wanted:
        room(made.bytes)  # weights evicted for more than this come back
    return made, cost


def others(
    footprint: Footprint, measure: Measure, place: OffloadStore | None, batching: ExecutionConfig
) -> Iterator[Footprint]:
    """``footprint`` with the other strategies; offloaded rows wait in ``place``."""
    stage, barriers, cost = footprint.stage, None, footprint.cost
    for strategy in ladder(stage, measure.lockstep, batching.thresholds):
        if strategy.barriers is not barriers:
            barriers = strategy.barriers
            cost = measure.row(barriers)
        parked = None
        if strategy.offloads is not None and place is not None:
            parked = measure.row(barriers, strategy.place(place))
        sampled = None
        if barriers is not None and streams(stage, barriers):
            sampled = sampled_rows(stage, batching.thresholds)
        yield replace(
            footprint, strategy=strategy, cost=cost, parked=parked, sampled=len(sampled or ())
        )


def attempts(
    plan: Plan, lockstep: Lockstep, thresholds: Thresholds, *, sweep: bool
) -> Iterator[Plan]:
    """``plan``, followed by plans that use less in case memory runs out: in a sweep the other
    strategies (in host memory, if it is separate), then half as many rows at once, down to one."""
    yield plan
    if sweep:
        for strategy in _further(plan, lockstep, thresholds):
            host = plan.host_limit
            if strategy.offloads is not None and not host:
                host = free_host()
            plan = replace(plan, strategy=strategy, on_device=0, host_limit=host)
            yield plan
    rows = min(plan.at_once, plan.rows)
    yield from (replace(plan, at_once=some) for some in halved(rows) if some < rows)


def _further(plan: Plan, lockstep: Lockstep, thresholds: Thresholds) -> list[Strategy]:
    """The footprints that can be measured: each needs a row to run, for which memory may be missing
    too."""
    strategies = [plan.strategy] if plan.on_device else []
    try:
        for strategy in ladder(plan.stage, lockstep, thresholds):
            if strategy.slower > plan.strategy.slower:
                strategies.append(strategy)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    apart = [strategy for strategy in strategies if strategy.offloads is not None]
    return apart or strategies


def complaint(said: str, tried: Sequence[Plan]) -> str:
    """The message if memory did not suffice for any of the plans ``tried``."""
    rows = [f"{p.at_once} rows at once" if p.at_once > 1 else "one row at once" for p in tried]
    named = [
        ", ".join(filter(None, (r, p.strategy.name))) for r, p in zip(rows, tried, strict=True)
    ]
    return (
        f"Out of memory in the {tried[0].stage.name} ({said}). Tried: {'; '.join(named)}. Lower "
        "samples or timesteps (fewer rows), or latent_size (smaller ones), "
        "or free memory elsewhere. The model is unchanged."
    )


def changes_bytes(changes: Mapping[str, SiteChanges], device: torch.device) -> int:
    """Largest size in bytes of the merged changes, as float32 factors of rank Σ r_i; they are on
    the LoRAs' device."""
    return sum(
        4 * sum(site.shape) * site.rank
        for site in changes.values()
        if site.like.up.device.type == device.type
    )
