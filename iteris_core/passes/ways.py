"""The ways to run a sweep, all with the same result: where rows wait, and where they pause.

On the device, at every site: the quickest, and what takes most. In host memory, at the end of every
level. Block by block (:mod:`..activations.blocks`), on the device or in host memory: a row waits
with what enters a block, small ones or large ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..activations.blocks import Levels
from ..activations.levels import Found, watched, with_replayable
from ..activations.lockstep import Lockstep
from ..activations.meter import free_memory, usable
from ..activations.micro_batch import MicroBatch, Observer
from ..activations.parking import Place
from ..activations.processes import Processes
from ..hosts.protocol import Stage
from ..solve.choose import Policy
from .batches import sampled_rows
from .measure import Measure, streams
from .need import Need

ON_DEVICE, IN_HOST = "waiting on the device", "waiting in host memory"

BLOCKS = {"small blocks": 3, "large blocks": 8}
"""Levels of a block at most. Small ones are an attention or a feed-forward, which run about two and
a half times; large ones are what a transformer repeats, which run up to five times."""


def other_ways(need: Need, measure: Measure, place: Place | None, policy: Policy) -> list[Need]:
    """``need``, of rows that wait on the device, in the other ways; host memory is ``place`` (None:
    there is none beside the device's)."""
    return list(_ways(need, measure, place, policy))


def _ways(need: Need, measure: Measure, place: Place | None, policy: Policy) -> Iterator[Need]:
    found = find(measure.stage, measure.lockstep)
    if place is not None:
        levels = found.levels()
        yield replace(
            need,
            cost=measure.row(levels),
            parked=measure.row(levels, place),
            name=IN_HOST,
            levels=levels,
        )
    before = None
    for size, most in BLOCKS.items():
        levels = replayable(measure.stage, measure.lockstep, found.levels(most))
        if not levels.blocks or levels.blocks == before:
            continue
        before = levels.blocks
        sampled = sampled_rows(measure.stage, policy) if streams(measure.stage, levels) else None
        blocks = replace(
            need,
            cost=measure.row(levels),
            name=f"{ON_DEVICE}, by {size}",
            levels=levels,
            sampled=len(sampled or ()),
        )
        yield blocks
        if place is not None:
            parked = measure.row(levels, place)
            yield replace(blocks, parked=parked, name=f"{IN_HOST}, by {size}")


def find(stage: Stage, lockstep: Lockstep) -> Found:
    """The levels of a stage, by its first row."""
    return watched(lockstep, lambda observer: _first_row(stage, observer))


def replayable(stage: Stage, lockstep: Lockstep, levels: Levels) -> Levels:
    """``levels`` with the blocks that can be replayed."""
    return with_replayable(levels, lockstep, lambda observer: _first_row(stage, observer))


def free_host(processes: Processes) -> int:
    """Bytes of the host's memory that each process may use."""
    return usable(free_memory(torch.device("cpu"))) // processes.size


def _first_row(stage: Stage, observer: Observer | None) -> MicroBatch:
    return MicroBatch(lambda: stage.run([0], 1), [stage.owners[0]], 1, observer)
