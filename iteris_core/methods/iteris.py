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

import math
from dataclasses import replace
from functools import partial
from typing import cast

import torch

from ..hosts.protocol import Stage
from ..lora import SiteChanges
from ..passes.batches import SWEEP, ExecutionConfig, Schedule
from ..passes.job import Job, Run
from ..passes.sweep import solve_sites
from ..solve.inputs import InputMoments
from ..solve.moments import OutputMoments
from ..solve.problem import ByOutput, Reduction, SiteContext, Solution, StageSolver, Tokens, Weigher
from ..solve.ranks import Components, share_numbers
from .block_polish import BlockSteps, expect_block_polish, polish_blocks
from .fitting import IterisSettings, Repairs, Solvers, streams_of, with_repairs, without_idle
from .registry import Merged, on_model


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
            solver_of = partial(solver_of, ranks=_shared_ranks(run, solvers, batching))
        solutions, log = solve_sites(run, solver_of, batching, schedule)
        solutions = without_idle(solutions, repairs)
        changes = {site: solution.change for site, solution in solutions.items()}
        if by_blocks.steps:
            changes, notes = polish_blocks(run, changes, by_blocks)
            log = replace(log, notes=notes)
    sites = {s: replace(solution, change=changes[s]) for s, solution in solutions.items()}
    return Merged(sites, log, repairs.keys())


def _shared_ranks(run: Run, solvers: Solvers, batching: ExecutionConfig) -> dict[str, int]:
    """Site → its rank, at least 1, in a file as large as with ``settings.rank`` at every site of a
    LoRA, by the result of a sweep without a cut."""
    job, settings, rank = solvers.job, solvers.settings, cast(int, solvers.settings.rank)
    own = [changes for site, changes in job.changes.items() if site not in solvers.repairs]
    numbers = sum(min(rank, changes.rank) * sum(changes.shape) for changes in own)
    uncut = replace(solvers, settings=replace(settings, rank=None, share_ranks=False))
    found: dict[str, Components] = {}

    def weighed(stage: Stage) -> StageSolver:
        solver = uncut.of(stage, residuals=True)

        def begin(context: SiteContext) -> Reduction:
            reduction = solver.begin(context)
            assert isinstance(reduction, OutputMoments)
            reduction.weigher = _WithOutputs(reduction.weigher, context)
            return reduction

        def solve(site: str, reduction: Reduction) -> Solution:
            solution = solver.solve(site, reduction)
            found[site] = _components(reduction, solution)
            return solution

        return replace(solver, begin=begin, solve=solve)

    solve_sites(run, weighed, batching, sweeps=2)
    return share_numbers(found, numbers, least=1)


class _WithOutputs(Weigher):
    """λ from ``inner``, plus the energy of the whole outputs."""

    def __init__(self, inner: Weigher, context: SiteContext) -> None:
        self._inner = inner
        self.outputs = ByOutput(len(context.changes), context.device)

    def add(self, tokens: Tokens) -> None:
        self._inner.add(tokens)
        self.outputs.add(tokens)

    def values(self, changes: SiteChanges, inputs: InputMoments) -> list[float]:
        return self._inner.values(changes, inputs)


def _components(reduction: Reduction, solution: Solution) -> Components:
    assert isinstance(reduction, OutputMoments)
    assert isinstance(reduction.weigher, _WithOutputs)
    targets, outputs = reduction.energies, reduction.weigher.outputs.energies
    explained = [1 - min(after, 1.0) ** 2 for after in solution.after]
    weights = torch.tensor(solution.weighting, dtype=torch.float64)
    given = float((weights * targets.double().cpu() * torch.tensor(explained)).sum())
    whole = max(float((weights * outputs.double().cpu()).sum()), 1e-30)
    # Both factors' norms contain the roots of the singular values at the output, up to one common
    # factor.
    shares = solution.change.up.double().norm(dim=0) ** 4
    shares = (shares / shares.sum().clamp(min=1e-30)).cpu()
    total = math.sqrt(given / whole)
    lost = torch.cat([shares.new_ones(1), 1 - shares.cumsum(0)])
    return Components(solution.change, total * (lost[:-1].square() - lost[1:].square()), total)
