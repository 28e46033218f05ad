"""The number of samples that a time budget leaves room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .batches import ExecutionConfig
from .eta import Eta, Passes, Seen
from .job import Job

LEAST = 12
"""Samples of a concept below which a merge keeps too little (the preset ``fast`` has as many)."""


def within_time(job: Job, seen: Sequence[Seen]) -> Job:
    """``job`` with as many samples of a concept as fit into its calibration's ``minutes``: those
    that it has at most, :data:`LEAST` at least. What was ``seen`` of its stages says how long a
    forward takes. Without a limit, or where nothing was seen, ``job`` itself."""
    calibration = job.calibration
    if calibration.minutes is None or not any(one.a_row for one in seen):
        return job
    most, budget = calibration.samples, 60 * calibration.minutes
    few = min(LEAST, most)
    slowest, quickest = _seconds(job, seen, most), _seconds(job, seen, few)
    if slowest <= budget:
        return job
    room = max(budget - quickest, 0.0) / (slowest - quickest) if slowest > quickest else 0.0
    return _with_samples(job, few + int(room * (most - few)))


def _with_samples(job: Job, samples: int) -> Job:
    return replace(job, calibration=replace(job.calibration, samples=samples))


def _seconds(job: Job, seen: Sequence[Seen], samples: int) -> float:
    """About how long the sweeps take with so many samples of a concept, in the quickest way."""
    job = replace(_with_samples(job, samples), eta=Eta(rounds=job.eta.rounds))
    for one in seen:
        job.eta.saw(one, job.concepts, job.calibration)
    batching = ExecutionConfig(1, "enough", policy=job.policy)
    job.eta.expect(Passes(job.changes, batching, processes=job.processes.size), job.denoised)
    return job.eta.forecast.left() or 0.0
