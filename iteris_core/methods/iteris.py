"""IterIS (CVPR 2025, arXiv 2411.15231): least squares on the inputs the merged model really sees.

``jacobi`` is the iteration of the paper's Algorithm 1: solve every site from the last merged
model's features, ``iterations`` times or until no change moves by more than ``tolerance``.
``sweep`` solves every site once, in execution order, on inputs that already passed the solved
sites: one pass, to the fixed point of the iteration (DESIGN 3.5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from typing import Any

import torch

from ..activations.collect import Collector, SiteMoments
from ..errors import IterisError, SolveError
from ..lora import LowRank, concatenate
from ..passes.batches import Batching, micro_batches
from ..passes.budget import plan
from ..passes.job import Job
from ..passes.loops import sweep_pass
from ..report.report import SiteReport
from ..solve.rows import SiteRows, solve_rows
from ..solve.site import Solution, solve_site
from .iteris_settings import IterisSettings
from .polish import polish
from .registry import Merged, method
from .repair import add_repairs, at_all_inputs, at_inputs

_RIDGE = 1e-6
_ENOUGH = 50  # prompts a concept; with fewer a fit follows the sample, and wants more ridge


@method("iteris", IterisSettings, needs_host=True)
def iteris(job: Job, settings: IterisSettings) -> Merged:
    """Least squares on the inputs that the merged model really sees (IterIS, CVPR 2025)."""
    if settings.repair and settings.objective == "output":
        add_repairs(job, settings.repair_inputs)
    run = _Run(job, settings)
    if settings.schedule == "sweep":
        sweep_pass(job, run.visitor_and_solve, run.batching)
    else:
        run.jacobi()
    check_complete(job, run.solutions)
    changes = {site: solution.change for site, solution in run.solutions.items()}
    if settings.polish_steps:
        changes = polish(
            job,
            changes,
            steps=settings.polish_steps,
            rate=settings.polish_rate,
            batch=settings.micro_batch,
        )
    return {
        site: (changes[site], site_report(solution, repair=site in job.repairs))
        for site, solution in run.solutions.items()
    }


def check_complete(job: Job, solved: Mapping[str, object]) -> None:
    """Raise :class:`IterisError` if a forward never reached a site."""
    missed = set(job.references) - set(solved)
    if missed:
        raise IterisError(
            f"{len(missed)} sites were never reached by a forward, such as {min(missed)}; "
            "they cannot be merged by their features. Leave them out of the LoRAs."
        )


def site_report(solution: Solution, *, repair: bool = False) -> SiteReport:
    return SiteReport(
        solution.change.rank,
        solution.balance,
        solution.before,
        solution.after,
        solution.condition,
        solution.truncated,
        repair,
    )


class _Run:
    def __init__(self, job: Job, settings: IterisSettings) -> None:
        self.job = job
        self.settings = settings
        focus = settings.saliency
        if focus is None:
            focus = max(0.0, 1 - 2 / job.loras)
        self.acting: Set[str] = set()
        if focus:
            assert job.host is not None
            own = set(job.references) - set(job.repairs)
            self.acting = own & set(job.host.streams(own))
        few = max(1.0, _ENOUGH / job.calibration.samples)
        self.ridge = _RIDGE * few**2 if settings.ridge is None else settings.ridge
        self.batching = Batching(
            settings.micro_batch,
            None if settings.row_tokens == "all" else settings.row_tokens or "enough",
            job.calibration.seed,
            focus=focus,
            cross=settings.objective == "adapter",
            itemsize=4 if settings.precision == "float32" else 8,
        )
        self.solutions: dict[str, Solution] = {}

    def visitor_and_solve(self) -> tuple[Collector, Callable[[str], LowRank]]:
        collector = self._collector(sweep=True)

        def solve(site: str) -> LowRank:
            rows = collector.take_rows(site)
            found = self._solve(site, collector.take(site) if rows is None else rows)
            self.solutions[site] = found
            return found.change

        return collector, solve

    def jacobi(self) -> None:
        job, host, iterations = self.job, self.job.host, self.settings.iterations
        assert host is not None
        wanted = set(job.references)
        with job.lockstep() as lockstep:
            samples = job.samples(lockstep)
            fitted: dict[str, Batching] = {}
            for iteration in range(iterations):
                # Before the first solve there is no merged model: X̃ = X (Algorithm 1, initial).
                copies = 1 if iteration == 0 else 2
                solved: dict[str, Solution] = {}
                job.tick("iterations", iteration, iterations)
                for stage in host.stages(samples, wanted):
                    job.rows = max(job.rows, len(stage.owners))
                    if stage.name not in fitted:
                        _, fitted[stage.name] = plan(
                            job, stage, lockstep, self.batching, copies=2, sweep=False
                        )
                    collector = self._collector()
                    for batch in micro_batches(
                        stage, copies, collector, fitted[stage.name], job.shards
                    ):
                        lockstep.run(batch)
                        job.tick("iterations", iteration, iterations)
                    for site in collector.sites:
                        solved[site] = self._solve(site, collector.take(site))
                if iteration:
                    job.convergence.append(_largest_change(self.solutions, solved))
                self.solutions = solved
                lockstep.merged = {site: s.change for site, s in solved.items()}
                if self._converged():
                    break
            job.tick("iterations", iterations, iterations)

    def _converged(self) -> bool:
        """Whether the last iteration moved no change by more than the tolerance; the answer of all
        processes is one."""
        tolerance, changes = self.settings.tolerance, self.job.convergence
        if tolerance is None or not changes:
            return False
        return bool(self.job.shards.least(int(changes[-1] <= tolerance)))

    def _collector(self, *, sweep: bool = False) -> Collector:
        rank = self.settings.rank
        return Collector(
            self.job.references,
            full=self.settings.objective == "output",
            balance=self.settings.weighting,
            dtype=getattr(torch, self.settings.precision),
            shards=self.job.shards,
            acting=self.acting,
            inputs={s: some for s, some in self.job.repairs.items() if some is not None},
            sweep=sweep,
            rank=rank if isinstance(rank, int) else None,
            keep_rows=self.ridge > 0 and self.settings.shrink == 1,
        )

    def _solve(self, site: str, found: SiteMoments | SiteRows) -> Solution:
        settings, repair = self.settings, site in self.job.repairs
        changes = self.job.references[site]
        inputs = self.job.repairs.get(site)
        if inputs is not None:
            changes = at_inputs(changes, inputs)
        common: dict[str, Any] = {
            "balance": settings.weighting,
            "ridge": self.ridge,
            "rank": settings.rank,
            "residuals": not repair,
            "exact": not repair,
        }
        try:
            if isinstance(found, SiteRows):
                solution = solve_rows(changes, found, self.job.weights, **common)
            else:
                solution = solve_site(
                    changes,
                    found.shared,
                    found.targets,
                    self.job.weights,
                    align="adapter" if settings.objective == "adapter" else "full",
                    shrink=settings.shrink,
                    **common,
                )
        except SolveError as error:
            raise SolveError(f"Site {site}: {error}") from error
        if inputs is None:
            return solution
        _, width = next(c.shape for c in self.job.references[site] if c is not None)
        return replace(solution, change=at_all_inputs(solution.change, inputs, width))


def _largest_change(old: dict[str, Solution], new: dict[str, Solution]) -> float:
    """max over sites of ‖ΔW_new − ΔW_old‖ / ‖ΔW_new‖, on factors."""
    largest = 0.0
    for site, solution in new.items():
        after, before = solution.change.to(torch.float64), old[site].change.to(torch.float64)
        norm = after.squared_norm()
        gap = max(0.0, concatenate([after, before.scaled(-1.0)]).squared_norm())
        largest = max(largest, (gap / norm) ** 0.5 if norm > 0 else 0.0)
    return largest
