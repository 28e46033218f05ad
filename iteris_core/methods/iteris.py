"""IterIS (CVPR 2025, arXiv 2411.15231): least squares on the inputs of the merged model.

There are two schedules. ``jacobi`` is the paper's Algorithm 1: solve every site from the features
of the last merged model, repeatedly. ``sweep`` solves every site once, in execution order, on
inputs that already passed through the solved sites. A site's inputs depend only on earlier sites,
so one sweep gives the same result as the iteration, if that converges.

With shared ranks, a layer counts by √(E / Y): E is the energy of the change's outputs, Σ λ_i ‖X̃_i
ΔWᵀ‖², and Y that of the layer's whole outputs under the LoRAs. A merge of many LoRAs has many
components of similar energy. If s is the share of E not yet covered, a component is worth its
reduction of s². The first components of every layer therefore come before the last ones of any.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import partial
from typing import cast

from ..passes import held_out
from ..passes.batches import SWEEP, ExecutionConfig, Schedule
from ..passes.job import Job, Merged
from ..passes.sweep import Passes
from ..solve.ranks import Components, share_numbers
from .distillation import Distillation
from .fitting import IterisSettings, Repairs, solver_of, streams_of, with_repairs
from .registry import Fit, on_model


@on_model(
    "iteris",
    IterisSettings,
    sweeps=lambda given: 0 if given.schedule == "jacobi" else 1 + given.share_ranks,
    sums=True,
)
def iteris(job: Job, settings: IterisSettings) -> Generator[Fit]:
    """Least squares on the inputs of the merged model (IterIS, CVPR 2025)."""
    repairs: Repairs = {}
    if settings.repair and settings.objective == "output":
        job, repairs = with_repairs(job)
    schedule = SWEEP
    if settings.schedule == "jacobi":
        schedule = Schedule(False, settings.iterations)
    saliency = settings.saliency
    if saliency is None:  # two concepts hardly compete
        saliency = max(0.0, 1 - 2 / job.loras)
    changed = job.changes.keys() - repairs.keys()
    acting = changed & streams_of(job).keys() if saliency else set[str]()
    tokens = None if settings.row_tokens == "all" else settings.row_tokens or "enough"
    seed, thresholds = job.calibration.seed, job.thresholds
    batching = ExecutionConfig(settings.micro_batch, tokens, seed, saliency, thresholds)
    solver_for = partial(solver_of, job, acting, repairs)
    solver = partial(solver_for, settings)
    with job.run() as run:
        distillation = Distillation(run) if job.steps else None
        passes = Passes(run, solver, batching, schedule, 1 + settings.share_ranks)
        if distillation is not None:
            passes.also = distillation.plan
            job.eta.expect(held_out.WHAT, held_out.held_out_work(job, versions=2))

        def merge() -> Merged:
            if settings.share_ranks:
                components: dict[str, Components] = {}
                uncut = replace(settings, rank=None, share_ranks=False)
                passes.solver_of = partial(solver_for, uncut, found=components)
                passes.solve()
                rank = cast(int, settings.rank)
                own = [job.changes[site] for site in changed]
                numbers = sum(min(rank, changes.rank) * sum(changes.shape) for changes in own)
                passes.solver_of = partial(
                    solver, ranks=share_numbers(components, numbers, changed)
                )
            merged = passes.solve()
            # Repairs of zero are those where nothing has drifted yet.
            sites = {
                site: solution
                for site, solution in merged.sites.items()
                if site not in repairs or solution.change.squared_norm()
            }
            merged = replace(merged, sites=sites)
            return merged if distillation is None else distillation.trained(merged, settings.bound)

        yield Fit(merge, passes)
