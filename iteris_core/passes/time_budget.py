"""The number of samples that fits into a time budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .batches import ExecutionConfig
from .eta import Eta, Passes, Seen
from .job import Job

LEAST = 12
"""Minimum samples per concept; with fewer, a merge keeps too little (the preset ``fast`` uses
this)."""


def within_time(job: Job, seen: Sequence[Seen]) -> Job:
    """``job`` with as many samples per concept as fit into its calibration's ``minutes``: at least
    :data:`LEAST`, at most the requested number. The observations ``seen`` of its stages give the
    time of a forward. Without a limit or observations, ``job`` itself."""
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
    """Rough duration of the sweeps with that many samples per concept, with the fastest
    strategy."""
    job = replace(_with_samples(job, samples), eta=Eta(rounds=job.eta.rounds))
    for one in seen:
        job.eta.saw(one, job.concepts, job.calibration)
    batching = ExecutionConfig(1, "enough", policy=job.policy)
    job.eta.expect(Passes(job.changes, batching), job.denoised)
    return job.eta.forecast.left() or 0.0
