"""The work of a merge, counted before it starts, in multiply-adds; and the samples for a time.

Denoising, the sweep and the polish are forwards of so many rows, and a
:class:`.job.StageTiming` says what one takes. A site's moments and solve
follow from its shape. :class:`..progress.Forecast` turns work into time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle, islice

from ..activations.memory import is_apart
from ..concepts import Calibration
from .batches import SWEEP, ExecutionConfig, Schedule, limit_of
from .job import Job, SiteCost, StageTiming

SOLVING, ITERATIONS, FEATURES = "solving sites", "iterations", "features of the {}"
LEAST = 12
"""Minimum samples per concept; with fewer, a merge keeps too little (the preset ``fast`` uses
this)."""

_NEXT_SWEEP = "next sweep"
_FACTORS = 4.0  # cost of factors and eigenvectors, relative to the same number of products
_FLOAT32 = 8.0  # cost of a product in float32 on a graphics card, relative to one in a forward


def denoising_work(job: Job) -> float:
    """The work of making the samples."""
    each = [seen.products for seen in job.seen if seen.stage.spatial]
    return job.denoised * sum(each) / len(each) if each else 0.0


def forward_work(job: Job) -> float:
    """The work of a row's forward in the last stage (0: unknown)."""
    return job.seen[-1].products if job.seen else 0.0


def expect_sites(
    job: Job,
    batching: ExecutionConfig,
    schedule: Schedule,
    slower: Mapping[str, float],
    sweeps: int,
) -> None:
    """Expect the passes over the stages that the job has seen: ``sweeps`` of them in all, in which
    the forwards of a stage take ``slower`` times as long."""
    eta = job.eta
    stages = {
        one.stage.name: sites_work(job, one, batching, schedule, slower.get(one.stage.name, 1.0))
        for one in job.seen
    }
    solves = [solve for sites in stages.values() for _, solve in sites]
    steps = [way + solve for sites in stages.values() for way, solve in sites] or [1.0]
    if schedule.passes > 1:
        eta.expect(ITERATIONS, [sum(steps)] * schedule.passes)
    elif schedule.sweep:
        eta.expect(SOLVING, steps)
        eta.expect(_NEXT_SWEEP, [sum(steps)] * (sweeps - 1))
    else:
        for name, sites in stages.items():
            eta.expect(FEATURES.format(name), [sum(way for way, _ in sites)])
        eta.expect(SOLVING, solves or [1.0])


def sites_work(
    job: Job,
    seen: StageTiming,
    batching: ExecutionConfig,
    schedule: Schedule = SWEEP,
    slower: float = 1.0,
) -> list[tuple[float, float]]:
    """For each of the job's sites in a stage, in order: the work of one pass's forwards from the
    site before, which take ``slower`` times as long, and that of its moments and solve."""
    stage = replace(seen.stage, concept_ids=_owners(job, seen), samples=None)
    rows, limit = len(stage.concept_ids), limit_of(stage, batching)
    slow = _FLOAT32 if is_apart(seen.device) else 1.0
    work: list[tuple[float, float]] = []
    way = 0.0
    for site, reached in seen.sites.items():
        way += slower * rows * schedule.copies * reached.products
        if site in job.changes:
            width = reached.shape[1]
            tokens = rows * min(reached.tokens, limit(width) if limit else reached.tokens)
            work.append((way, slow * _solve(reached, tokens, job.changes[site].rank)))
            way = 0.0
    return work


def _solve(reached: SiteCost, tokens: int, rank: int) -> float:
    """The products for a site's moments and solve: X̃ᵀX̃ or, with fewer tokens than inputs, X̃X̃ᵀ;
    its factor; and the target in some output directions."""
    out, width = reached.shape
    few, rows = min(tokens, width), min(out, int(1.25 * rank) + 32)
    return tokens * width * (few + 2 * rows) + _FACTORS * few * width * (few / 3 + rows)


def _owners(job: Job, seen: StageTiming) -> list[int]:
    """The concept of each of a stage's rows, roughly: those seen, as often as there are more
    samples."""

    def count(calibration: Calibration) -> int:
        return job.samples_of(calibration) * (calibration.rows_each if seen.stage.spatial else 1)

    owners = seen.stage.concept_ids
    total = len(owners) * count(job.calibration) / count(seen.calibration)
    return list(islice(cycle(owners), round(total)))


def within_time(job: Job, sweeps: int) -> Job:
    """``job`` with as many samples per concept as fit into its calibration's ``minutes``: at least
    :data:`LEAST`, at most the requested number. Without a limit, or if it is unknown how long a
    forward takes, ``job`` itself."""
    calibration = job.calibration
    rate = job.eta.rate
    if calibration.minutes is None or rate is None:
        return job

    def seconds(samples: int) -> float:
        of = replace(job, calibration=replace(calibration, samples=samples))
        batching = ExecutionConfig(1, "enough", thresholds=job.thresholds)
        sites = (sum(pair) for seen in job.seen for pair in sites_work(of, seen, batching))
        return rate * (denoising_work(of) + sweeps * sum(sites))

    most, budget = calibration.samples, 60 * calibration.minutes
    few = min(LEAST, most)
    slowest, quickest = seconds(most), seconds(few)
    if slowest <= budget:
        return job
    room = max(budget - quickest, 0.0) / (slowest - quickest) if slowest > quickest else 0.0
    samples = few + math.floor(room * (most - few))
    return replace(job, calibration=replace(calibration, samples=samples))
