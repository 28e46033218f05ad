"""What is tried where memory runs out all the same: others may take what a plan counted on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from ..activations.meter import free_memory, is_apart, is_out_of_memory, usable
from ..errors import OutOfMemory, brief
from ..hosts.protocol import Stage
from .batches import Batching, Waiting
from .job import Job

_Ran = TypeVar("_Ran")


def within_memory(
    job: Job, stage: Stage, fitted: Batching, run: Callable[[Batching], _Ran], *, sweep: bool
) -> tuple[_Ran, Batching]:
    """What ``run`` gives, and the batching with which it had memory enough: ``fitted``, or one that
    takes less."""
    tried: list[str] = []
    said = ""  # not the error itself, whose frames hold tensors
    for batching in [fitted, *_less(job, stage, fitted, sweep)]:
        try:
            return run(batching), batching
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tried.append(_attempt(batching))
            said = brief(error)
        gc.collect()  # frames that the error has left
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise OutOfMemory(
        f"Memory ran out in the {stage.name} ({said}). Tried: {'; '.join(tried)}. Lower samples or "
        "timesteps (fewer rows), or latent_size (smaller ones), or close what else takes memory. "
        "The model is as it was."
    )


def _less(job: Job, stage: Stage, fitted: Batching, sweep: bool) -> Iterator[Batching]:
    """In a sweep all rows wait in host memory, where that is another; then half as many at once,
    down to one."""
    if sweep:
        waiting = fitted.waiting or _in_host(job)
        if waiting is not None and fitted.waiting != replace(waiting, on_device=0):
            fitted = replace(fitted, waiting=replace(waiting, on_device=0))
            yield fitted
    rows = min(fitted.rows, len(stage.owners))
    while rows > 1:
        rows //= 2
        yield replace(fitted, rows=rows)


def _in_host(job: Job) -> Waiting | None:
    module = next(iter(job.host.sites().values()))
    device = next(module.parameters()).device
    if not is_apart(device):
        return None
    free = usable(free_memory(torch.device("cpu"))) // job.processes.size
    return Waiting(0, device, free)


def _attempt(batching: Batching) -> str:
    rows = f"{batching.rows} rows at once" if batching.rows > 1 else "one row at once"
    if batching.waiting is None:
        return rows
    return f"{rows}, {batching.waiting.on_device} waiting on the device, others in host memory"
