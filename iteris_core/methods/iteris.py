"""IterIS (CVPR 2025, arXiv 2411.15231): least squares on the inputs of the merged model.

There are two schedules. ``jacobi`` is the paper's Algorithm 1: solve every site from the features
of the last merged model, repeatedly. ``sweep`` solves every site once, in execution order, on
inputs that already passed through the solved sites. A site's inputs depend only on earlier sites,
so one sweep gives the same result as the iteration, if that converges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch

from ..hosts.protocol import Stage
from ..lora import SiteChanges
from ..passes.batches import SWEEP, ExecutionConfig, Schedule
from ..passes.job import Job, Run
from ..passes.sweep import solve_sites
from ..solve.problem import Reduction, RegressionSpec, Solution, StageSolver
from .block_polish import BlockSteps, expect_block_polish, polish_blocks
from .iteris_settings import IterisSettings
from .registry import Merged, on_model
from .repair import (
    Repairs,
    at_all_inputs,
    sizes_of,
    streams_of,
    with_repairs,
    without_idle,
)
from .shared_ranks import shared_ranks

_NO_RANKS: Mapping[str, int] = {}


def _sweeps(settings: IterisSettings) -> int:
    return 0 if settings.schedule == "jacobi" else 2 if settings.share_ranks else 1


@on_model("iteris", IterisSettings, sweeps=_sweeps, sums=True)
def iteris(job: Job, settings: IterisSettings) -> Merged:
    """Least squares on the inputs of the merged model (IterIS, CVPR 2025)."""
    repairs: Repairs = {}
    if settings.repair and settings.objective == "output":
        job, repairs = with_repairs(job, settings.repair_inputs)
    steps = round(settings.block_steps * max(job.loras, 2) / 2)
    by_blocks = BlockSteps(steps, settings.block_rate, settings.block_pairs)
    if by_blocks.steps:
        expect_block_polish(job, by_blocks)
    schedule = SWEEP
    if settings.schedule == "jacobi":
        schedule = Schedule(False, settings.iterations, settings.tolerance)
    saliency = settings.saliency
    if saliency is None:
        saliency = job.thresholds.saliency_for(job.loras)
    changed = job.changes.keys() - repairs.keys()
    acting = changed & streams_of(job).keys() if saliency else set[str]()
    solvers = Solvers(job, settings, acting, repairs)
    tokens = None if settings.row_tokens == "all" else settings.row_tokens or "enough"
    seed, thresholds = job.calibration.seed, job.thresholds
    batching = ExecutionConfig(settings.micro_batch, tokens, seed, saliency, thresholds)
    with job.run() as run:
        solver_of = solvers.of
        if settings.share_ranks:
            solver_of = partial(solver_of, ranks=_shared(run, solvers, batching))
        solutions, log = solve_sites(run, solver_of, batching, schedule)
        solutions = without_idle(solutions, repairs)
        changes = {site: solution.change for site, solution in solutions.items()}
        if by_blocks.steps:
            changes, notes = polish_blocks(run, changes, by_blocks)
            log = replace(log, notes=notes)
    sites = {s: replace(solution, change=changes[s]) for s, solution in solutions.items()}
    return Merged(sites, log, repairs.keys())


def _shared(run: Run, solvers: Solvers, batching: ExecutionConfig) -> dict[str, int]:
    """Ranks of all sites, for a file as large as with ``settings.rank`` at every site of a LoRA."""
    job, settings = solvers.job, solvers.settings
    own = [changes for site, changes in job.changes.items() if site not in solvers.repairs]
    rank = cast(int, settings.rank)
    numbers = sum(min(rank, changes.rank) * sum(changes.shape) for changes in own)
    uncut = replace(solvers, settings=replace(settings, rank=None, share_ranks=False))
    return shared_ranks(run, partial(uncut.of, residuals=True), batching, numbers)


@dataclass(frozen=True)
class Solvers:
    """Solves the sites of a ``job``'s stages. ``acting`` are the sites that show where in an image
    a LoRA acts."""

    job: Job
    settings: IterisSettings
    acting: Set[str]
    repairs: Repairs

    def of(
        self, stage: Stage, *, ranks: Mapping[str, int] = _NO_RANKS, residuals: bool = False
    ) -> StageSolver:
        """A stage's solver. ``ranks`` holds each site's rank (none: the settings'). With
        ``residuals``, repairs report their residual too; only the search for ranks reads it."""
        job, settings, repairs = self.job, self.settings, self.repairs
        dtype: torch.dtype = getattr(torch, settings.precision)
        ridge, pull = settings.ridge, settings.pull
        if ridge is None:
            ran = stage.samples or job.calibration.samples, job.calibration.rows_each, job.loras
            ridge = job.thresholds.ridge_for(*ran)
            pull = pull or job.thresholds.pull_for(*ran)
        pictures, weighting = job.host.pictures, settings.weighting
        if weighting == "auto":
            weighting = "tokens" if pictures else "none"
        shrink, few = settings.shrink, math.inf
        if shrink is None:
            shrink, few = job.thresholds.shrink_for(pictures), job.thresholds.few_tokens
        fit = RegressionSpec(
            job.weights,
            ridge,
            weighting,
            shrink=shrink,
            shrinks_below=few,
            rank=settings.rank,
            pull=pull or "mean",
        )
        repairing = replace(fit, dtype=dtype, residuals=residuals)  # many inputs wide
        inputs = {site: chosen for site, chosen in repairs.items() if chosen is not None}

        bounds = _bounds(job, settings)

        def fit_of(site: str) -> RegressionSpec:
            of = repairing if site in repairs else fit
            if site in bounds:
                of = replace(of, bound=bounds[site])
            return replace(of, rank=ranks[site]) if ranks else of

        def solve(site: str, reduction: Reduction) -> Solution:
            solution = reduction.solve(fit_of(site))
            if site not in inputs:
                return solution
            width = job.changes[site].shape[1]
            return replace(solution, change=at_all_inputs(solution.change, inputs[site], width))

        def used(site: str) -> SiteChanges:
            changes = job.changes[site]
            return changes.at(inputs[site]) if site in inputs else changes

        return StageSolver(
            begin=lambda context: job.thresholds.choose(context, fit, settings.objective, dtype),
            solve=solve,
            bytes=lambda site, sweep: job.thresholds.bytes(
                used(site), fit_of(site), settings.objective, dtype.itemsize, sweep=sweep
            ),
            dtype=dtype,
            acting=self.acting,
            inputs=inputs,
        )


def _bounds(job: Job, settings: IterisSettings) -> dict[str, float]:
    """Site → the largest norm of its change. Unless the settings say it, there is none in a
    component with gates, except at layers whose output is added without one."""
    sizes = sizes_of(job.changes)
    if settings.bound is not None:
        return {s: settings.bound * size for s, size in sizes.items()} if settings.bound else {}
    streams = streams_of(job)
    free = {site for site, stream in streams.items() if stream.gate is not None}
    gated = {site.partition(".")[0] for site in free}
    plain = streams.keys() - free
    return {
        site: job.thresholds.bound * size
        for site, size in sizes.items()
        if site in plain or site.partition(".")[0] not in gated
    }
