"""What is tried where memory runs out all the same: others may take what a plan counted on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeVar

import torch

from ..activations.lockstep import Lockstep
from ..activations.meter import is_apart, is_out_of_memory
from ..activations.oom_retry import halved, with_less
from ..hosts.protocol import Stage
from .batches import Batching, Waiting
from .job import Job
from .ways import BLOCKS, find, free_host, replayable

_Ran = TypeVar("_Ran")


def within_memory(
    job: Job,
    stage: Stage,
    fitted: Batching,
    run: Callable[[Batching], _Ran],
    sweep: Lockstep | None = None,
) -> tuple[_Ran, Batching]:
    """What ``run`` gives, and the batching with which it had memory enough: ``fitted``, or one that
    takes less. ``sweep`` is what runs, if that is one."""

    def complaint(said: str, tried: Sequence[Batching]) -> str:
        return (
            f"Memory ran out in the {stage.name} ({said}). Tried: "
            f"{'; '.join(map(_attempt, tried))}. Lower samples or timesteps (fewer rows), or "
            "latent_size (smaller ones), or close what else takes memory. The model is as it was."
        )

    return with_less(chain([fitted], _less(job, stage, fitted, sweep)), run, complaint)


def _less(job: Job, stage: Stage, fitted: Batching, sweep: Lockstep | None) -> Iterator[Batching]:
    """In a sweep all rows wait in host memory, where that is another, and then block by block; then
    half as many at once, down to one."""
    if sweep is not None:
        ways = _other_ways(job, stage, fitted, sweep)
        yield from ways
        fitted = ways[-1] if ways else fitted
    rows = min(fitted.rows, len(stage.owners))
    yield from (replace(fitted, rows=some) for some in halved(rows) if some < rows)


def _other_ways(job: Job, stage: Stage, fitted: Batching, sweep: Lockstep) -> list[Batching]:
    """Those that can be found: a row is run for it, for which there may be no memory either."""
    ways: list[Batching] = []
    try:
        found = find(stage, sweep)
        waiting = _in_host(job, fitted, found.device)
        if waiting is not None and fitted.waiting != waiting:
            levels = found.levels() if fitted.levels is None else fitted.levels
            fitted = replace(fitted, waiting=waiting, levels=levels)
            ways.append(fitted)
        if fitted.levels is None or not fitted.levels.blocks:
            levels = replayable(stage, sweep, found.levels(max(BLOCKS.values())))
            if levels.blocks:
                ways.append(replace(fitted, levels=levels))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return ways


def _in_host(job: Job, fitted: Batching, device: torch.device) -> Waiting | None:
    """``device`` is where the stage's tensors are; its weights may be offloaded."""
    if fitted.waiting is not None:
        return replace(fitted.waiting, on_device=0)
    if not is_apart(device):
        return None
    return Waiting(0, device, free_host(job.processes))


def _attempt(batching: Batching) -> str:
    tried = f"{batching.rows} rows at once" if batching.rows > 1 else "one row at once"
    if batching.levels is not None and batching.levels.blocks:
        tried += ", block by block"
    if batching.waiting is not None:
        tried += f", {batching.waiting.on_device} waiting on the device, others in host memory"
    return tried
