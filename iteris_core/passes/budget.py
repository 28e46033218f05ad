"""A memory budget, kept: how many rows run at once, where the others wait, and how many run at all.

The budget is what the user allows, or what the host says there is room for. Before a stage runs,
its longest row is measured (:mod:`.measure`). In a sweep every row waits at each site, on the
device or in host memory, and the moments and the solve of one site come on top; else there are the
moments of all sites. Of the ways that fit the quickest is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from ..activations.blocks import Levels
from ..activations.host_memory import HostMemory
from ..activations.lockstep import Lockstep
from ..activations.meter import is_apart
from ..errors import OutOfMemory
from ..hosts.protocol import Stage
from ..lora import SiteChanges
from ..progress import duration
from ..solve.choose import POLICY
from ..solve.problem import Bytes
from .batches import Batching, Waiting, fewer, limit_of
from .job import Job
from .measure import Measure
from .need import Need, Room
from .ways import ON_DEVICE, free_host, other_ways

_log = logging.getLogger(__name__)

BytesOf = Callable[[str, bool], Bytes]
"""``bytes_of(site, sweep)``: what a method takes there."""


@dataclass(frozen=True)
class StagePlan:
    """What a stage will take: ``at_once`` of ``rows`` rows at a time, out of ``offered``, in
    ``bytes`` beyond the model and about so many ``seconds``. Where rows wait for each other
    ``way`` says where and how; if in host memory, ``on_device`` do not (else None), and the others
    take ``host_bytes`` there. They pause at the end of each of ``levels`` (None: at every site)."""

    stage: str
    rows: int
    offered: int
    at_once: int
    bytes: int
    budget: float
    way: str = ""
    on_device: int | None = None
    host_bytes: int = 0
    seconds: float = 0.0
    levels: Levels | None = field(default=None, repr=False)

    def __str__(self) -> str:
        rows = f"{self.rows} rows"
        if self.rows < self.offered:
            rows = f"{self.rows} of {self.offered} rows (the others do not fit)"
        parts = [
            f"{self.stage}: {rows}",
            f"{self.at_once} at once",
            self.way,
            f"{self.bytes / 2**30:.2f} of {self.budget / 2**30:.2f} GiB",
            f"{self.host_bytes / 2**30:.2f} GiB of host memory" if self.host_bytes else "",
            f"about {duration(self.seconds)}",
        ]
        return ", ".join(filter(None, parts))


def plan(
    job: Job,
    stage: Stage,
    lockstep: Lockstep,
    batching: Batching,
    bytes_of: BytesOf,
    dtype: torch.dtype,
    *,
    copies: int,
    sweep: bool,
    passes: int = 1,
) -> tuple[Stage, Batching]:
    """``stage`` and ``batching`` so that the job's memory budget is kept. ``dtype`` is that of the
    moments, and ``passes`` says how often the rows are run."""
    budget = job.memory_budget
    if budget is None or not stage.sites:
        return stage, batching
    measure = Measure(stage, lockstep, copies, limit_of(stage, batching), dtype.itemsize)
    cost = measure.row()
    need = Need(
        stage,
        cost,
        None,
        {site: bytes_of(site, sweep) for site in stage.sites},
        changes_bytes(job.changes, cost.device) + lockstep.cast_bytes,
        job.processes,
        sweep,
        passes,
        ON_DEVICE if sweep else "",
        limits=lambda rows: limit_of(stage, batching, rows),
    )
    wanted = need.bytes_of(len(stage.owners), batching.rows)
    if budget == "free":
        sharing = 1 if is_apart(cost.device) else job.processes.size
        # All processes have to leave out the same rows.
        budget = job.processes.least(job.host.room(wanted) // sharing)
    else:
        job.host.room(min(wanted, budget))
    room, needs = Room(budget), [need]
    if sweep and wanted > budget:
        with ExitStack() as stack:
            place = None
            if is_apart(cost.device):
                room = Room(budget, job.processes.least(free_host(job.processes)))
                place = HostMemory(cost.device, room.host)
                stack.callback(place.close)
            needs += other_ways(need, measure, place, batching.policy)
    made, stage = plan_stage(needs, room, batching.rows, job.policy.way_gain)
    if made.bytes < wanted:
        job.host.room(made.bytes)  # weights that made way for more than this come back
    job.outlook.run_some(stage, lockstep, made.at_once)
    slower = made.seconds / max(need.seconds_of(made.rows, batching.rows), 1e-9)
    seconds = job.outlook.planned(stage, batching, made.seconds, max(slower, 1.0))
    made = replace(made, seconds=seconds)
    job.ran.plan.append(str(made))
    if made.rows < made.offered:
        _log.warning(
            "Not enough memory for all rows: %s; lower samples, timesteps or latent_size, or allow "
            "more memory",
            made,
        )
    job.tick(f"plan: {made}", 0, 0)
    waiting = None
    if made.on_device is not None:
        waiting = Waiting(made.on_device, cost.device, room.host)
    return stage, replace(batching, rows=made.at_once, waiting=waiting, levels=made.levels)


def changes_bytes(changes: Mapping[str, SiteChanges], device: torch.device) -> int:
    """What the merged changes take at most, float32 factors of Σ r_i: they are where the LoRAs'
    are."""
    return sum(
        4 * sum(site.shape) * site.rank
        for site in changes.values()
        if site.like.up.device.type == device.type
    )


def plan_stage(
    needs: Sequence[Need], room: Room, most: int, gain: float = POLICY.way_gain
) -> tuple[StagePlan, Stage]:
    """The quickest plan of up to ``most`` rows at once that fits into ``room``, and the stage with
    the rows that it has left. ``needs`` are the ways to run it, and one is taken in place of
    another before it where it seems ``gain`` times quicker.

    Where no way fits rows are left out, evenly over the concepts; a stage that a later one needs in
    full loses none. Raises :class:`OutOfMemory` where a row for each concept is too much.
    """
    stage, size = needs[0].stage, needs[0].processes.size
    offered = len(stage.owners)
    found = _quickest(needs, room, offered, most, offered, gain)
    if found is None:
        concepts = len(set(stage.owners))

        def left(share: int) -> Stage:
            return fewer(stage, share * concepts // size * size)

        def fits(share: int) -> bool:
            rows = len(left(share).owners)
            return _quickest(needs, room, rows, 1, offered, gain) is not None

        fewest = -(-size // concepts)
        share = None if stage.feeds else _most_that_fits(fits, fewest, offered // concepts)
        if share is None:
            raise _too_much(needs, room, offered if stage.feeds else fewest * concepts)
        stage = left(share)
        found = _quickest(needs, room, len(stage.owners), most, offered, gain)
        assert found is not None
    return found, stage


def _quickest(
    needs: Sequence[Need], room: Room, rows: int, most: int, offered: int, gain: float
) -> StagePlan | None:
    best = None
    for need in needs:
        ways = _of_way(need, room, rows, most, offered)
        made = min(ways, key=lambda made: made.seconds, default=None)
        if made is not None and (best is None or gain * made.seconds < best.seconds):
            best = made
    return best


def _of_way(need: Need, room: Room, rows: int, most: int, offered: int) -> Iterator[StagePlan]:
    """Those that fit."""
    mine = need.mine(rows)
    most = min(most, mine)

    def made(at_once: int, on_device: int | None = None) -> StagePlan:
        return StagePlan(
            need.stage.name,
            rows,
            offered,
            at_once,
            need.bytes_of(rows, at_once, on_device),
            room.device,
            need.name,
            on_device,
            need.host_bytes(rows, on_device),
            need.seconds_of(rows, at_once, on_device),
            need.levels,
        )

    if need.parked is None:
        at_once = _largest(lambda count: need.bytes_of(rows, count) <= room.device, 1, most)
        if at_once is not None:
            yield made(at_once)
        return
    for count in _halves(most):
        kept = _largest(
            lambda kept: need.bytes_of(rows, count, kept) <= room.device,  # noqa: B023
            0,
            mine - 1,
        )
        if kept is None:
            continue
        kept = kept // count * count  # whole forwards
        if need.host_bytes(rows, kept) <= room.host:
            yield made(count, kept)


def _too_much(needs: Sequence[Need], room: Room, fewest: int) -> OutOfMemory:
    def least(need: Need) -> int:
        return need.bytes_of(fewest, 1, None if need.parked is None else 0)

    need = min(needs, key=least)
    tried = ""
    if need.parked is not None:
        tried = (
            f", with rows waiting in {_size(need.host_bytes(fewest, 0))} of host memory, of which "
            f"{_size(room.host)} are free"
        )
    what = "all rows, which later stages need" if need.stage.feeds else "a row for each concept"
    return OutOfMemory(
        f"The {need.stage.name} needs at least {_size(least(need))} beyond the model for "
        f"{what}{tried}, and {_size(room.device)} may be used; lower samples, timesteps "
        "or latent_size, or allow more memory."
    )


def _size(count: float) -> str:
    """Bytes in the largest unit of which there is a tenth at least."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit / 10:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} bytes"


def _most_that_fits(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """About the largest number that ``fits``. Smaller ones nearly always do, but of fewer rows
    more tokens count, so that one may not."""
    above = most
    while most >= least:
        if fits(most):
            return _largest(fits, most, above)
        above, most = most - 1, min(most - 1, round(0.9 * most))
    return None


def _largest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The largest number that ``fits``, where all smaller ones do."""
    if most < least or not fits(least):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def _halves(most: int) -> Sequence[int]:
    return sorted({max(most >> bits, 1) for bits in range(most.bit_length())}, reverse=True)
