"""Shares the time that a merge may take between its samples and its steps."""

from __future__ import annotations

from dataclasses import replace

from ..calibration import LEAST_SAMPLES
from .batches import ExecutionConfig
from .held_out import held_out_work
from .job import Job, sites_work


def within_time(job: Job, sweeps: int) -> Job:
    """``job`` with as many samples per concept and as many steps as fit into its calibration's
    ``minutes``, the same share of both: at least :data:`LEAST_SAMPLES` samples and no step, at most
    the requested numbers. Without a limit, or if it is unknown how long a forward takes, ``job``
    itself."""
    calibration, rate = job.calibration, job.eta.rate
    if calibration.minutes is None or rate is None:
        return job
    most, fewest = calibration.samples, min(LEAST_SAMPLES, calibration.samples)

    def shared(share: float) -> Job:
        samples = fewest + int(share * (most - fewest))
        of_share = replace(job.calibration, samples=samples)
        return replace(job, calibration=of_share, steps=int(share * job.steps))

    def seconds(of: Job) -> float:
        batching = ExecutionConfig(1, "enough", thresholds=job.thresholds)
        sites = (sum(pair) for seen in job.trace.stages for pair in sites_work(of, seen, batching))
        work = of.denoising_work + sweeps * sum(sites) + of.steps * sum(of.steps_work.values())
        return rate * (work + sum(held_out_work(of, 2 if of.steps else 1)))

    shares = (share / 100 for share in range(100, -1, -1))
    fitting = (of for of in map(shared, shares) if seconds(of) <= 60 * calibration.minutes)
    return next(fitting, shared(0.0))
