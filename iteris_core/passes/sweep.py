"""Passes over the model that solve all sites: a single sweep, or several iterations.

In a sweep each site is solved in execution order, on inputs that passed through the sites solved
before. Otherwise all sites are solved after a pass: from reference rows, X with each LoRA alone
active, and then, in the paper's Algorithm 1, repeatedly from the last merged model's inputs. A
:class:`..solve.problem.StageSolver` defines a method's work at a stage's sites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ..activations.activation_offload import ActivationOffload
from ..activations.host_pool import HostPool
from ..activations.memory import with_less
from ..activations.micro_batch import MicroBatch, greenlets
from ..activations.rows import Row
from ..activations.trace import Barriers
from ..errors import SiteError, SolveError
from ..hosts.protocol import DENOISING, Stage
from ..linalg import on_host
from ..lora import LowRank, concatenate
from ..progress import OUTLOOK, duration
from ..solve.problem import Reduction, Solution, StageSolver
from .batches import SWEEP, ExecutionConfig, Schedule, micro_batches, sampled_rows
from .collect import Collector
from .job import Merged, Run, sites_work
from .planner import Plan, attempts, complaint, outlook_of, planned

SOLVING, ITERATIONS, FEATURES = "solving sites", "iterations", "features of the {}"
Solutions = dict[str, Solution]
SolverOf = Callable[[Stage], StageSolver]
PlanOf = Callable[[Stage, Sequence[Stage]], str]
"""``plan(stage, before)`` plans more for a stage, after the stages ``before`` it; returns the
plan's line, empty if there is none."""


@dataclass
class Passes:
    """Passes of a ``run`` that solve all its sites, the first of so many ``sweeps``.

    ``plans`` are those of all stages before anything was solved; ``also`` plans what comes after
    the passes. The job's report gets both in words.
    """

    run: Run
    solver_of: SolverOf
    batching: ExecutionConfig
    schedule: Schedule = SWEEP
    sweeps: int = 1
    also: PlanOf | None = None
    plans: list[Plan] = field(default_factory=list[Plan])
    _latest: dict[str, Plan] = field(default_factory=dict[str, Plan])
    """Of every stage, after retries."""
    _solutions: Solutions = field(default_factory=dict[str, Solution])
    _turn: int = 0

    def plan(self, *, of_rows: bool = True) -> None:
        """Plan every stage, before anything is denoised, so that what does not fit fails now. Rows
        that need no denoising are planned themselves, unless :meth:`solve` does it when it reaches
        them (not ``of_rows``), so that none runs twice."""
        job, lockstep = self.run.job, self.run.lockstep
        if self.schedule.sweep:
            greenlets()  # before samples are made
        lockstep.merged = {}
        job.eta.expect(DENOISING, [job.denoising_work])
        self._expect()
        ahead = self.run.ahead
        for stage in ahead.stages() if of_rows or ahead is not self.run else ():
            # A measurement is to find all changes cast.
            firsts = {row.concept: row for row in reversed(stage.rows)}
            for row in firsts.values():
                lockstep.run(MicroBatch(partial(stage.forward, [row], 1), [row]))
            plan = self._planned(stage)
            batching = replace(self.batching, rows=plan.at_once)
            for batch in micro_batches(stage, 1, None, batching) if stage.feeds_next else ():
                lockstep.run(batch)
        left, outlook = job.eta.left(), outlook_of(job, self.plans)
        job.report.outlook = f"about {duration(left)}, {outlook}" if left else outlook
        job.tick(OUTLOOK, 0, 0, outlook)  # which tells the time left

    def solve(self) -> Merged:
        """Every site's solution, in execution order. A site that no forward reaches is an error."""
        if not self.plans:
            self.plan(of_rows=False)
        run, report, before = self.run, self.run.job.report, Solutions()
        report.convergence.clear()
        _ = run.samples
        run.job.eta.expect(DENOISING, [])  # some may have been cached
        run.lockstep.merged = {}
        for turn in range(self.schedule.passes):
            self._turn = turn
            self._pass()
            run.lockstep.merged = {site: s.change for site, s in self._solutions.items()}
            if turn:
                report.convergence.append(_largest_change(before, self._solutions))
            before = self._solutions
        if self.schedule.passes > 1:
            run.job.tick(ITERATIONS, self.schedule.passes, self.schedule.passes)
        if missed := sorted(run.lockstep.changes.keys() - self._solutions.keys()):
            raise SiteError(
                f"{len(missed)} layers that the LoRAs change are not used by this base, such as "
                f"{missed[0]}. Take them out of the LoRAs."
            )
        errors = {s: of.errors for s, of in self._solutions.items() if of.errors is not None}
        pairs = zip(errors, on_host(errors.values()), strict=True)
        measured = {s: replace(self._solutions[s], errors=of) for s, of in pairs}
        return Merged({**self._solutions, **measured})

    def _pass(self) -> None:
        job, schedule, self._solutions = self.run.job, self.schedule, {}
        if schedule.sweep:
            job.tick(SOLVING, 0, len(self.run.lockstep.changes))
        if schedule.passes > 1:
            job.tick(ITERATIONS, self._turn, schedule.passes)
        for stage in self.run.stages():
            latest = self._latest.get(stage.name)
            plan = self._planned(stage) if latest is None else latest.of(stage)
            attempt = partial(
                self._sweep if schedule.sweep else self._collect_then_solve,
                self.solver_of(plan.stage),
            )
            tried = attempts(
                plan, self.run.lockstep, self.batching.thresholds, sweep=schedule.sweep
            )
            _, ran = with_less(tried, attempt, complaint)
            self._latest[stage.name] = _rowless(ran)

    def _planned(self, stage: Stage) -> Plan:
        solver, before = self.solver_of(stage), [plan.stage for plan in self.plans]
        report = self.run.job.report
        # Before the stage's own plan, for whose memory the host keeps the last free.
        more = self.also(stage, before) if self.also is not None else ""
        plan = planned(
            self.run, stage, solver, self.batching, schedule=self.schedule, before=before
        )
        report.rows = max(report.rows, plan.rows)
        if plan.budget < math.inf:
            report.plan.append(str(plan))
        if plan.rows < plan.offered:
            report.short.append(str(plan))
        if more:
            report.plan.append(more)
            self.run.job.tick(f"plan: {more}", 0, 0, more)
        self.plans.append(_rowless(plan))
        self._latest[stage.name] = self.plans[-1]
        self._expect()
        return plan

    def _expect(self) -> None:
        """Expect the passes over all stages, with the strategies planned so far."""
        job, eta, schedule = self.run.job, self.run.job.eta, self.schedule
        slower = {plan.stage.name: plan.strategy.slower for plan in self.plans}
        stages = {
            (name := seen.stage.name): sites_work(
                job, seen, self.batching, schedule, slower.get(name, 1.0)
            )
            for seen in job.trace.stages
        }
        steps = [way + solve for sites in stages.values() for way, solve in sites] or [1.0]
        if schedule.passes > 1:
            eta.expect(ITERATIONS, [sum(steps)] * schedule.passes)
        elif schedule.sweep:
            eta.expect(SOLVING, steps)
            eta.expect("next sweep", [sum(steps)] * (self.sweeps - 1))
        else:
            for name, sites in stages.items():
                eta.expect(FEATURES.format(name), [sum(way for way, _ in sites)])
            solves = [solve for sites in stages.values() for _, solve in sites]
            eta.expect(SOLVING, solves or [1.0])

    def _collect_then_solve(self, solver: StageSolver, plan: Plan) -> None:
        """Run all rows, then solve the sites. Before the first solve there is no merged model: X̃ =
        X (Algorithm 1, initial)."""
        job, turn, stage = self.run.job, self._turn, plan.stage
        batching = replace(self.batching, rows=plan.at_once)
        several = self.schedule.passes > 1
        collector = Collector(solver)
        batches = list(micro_batches(stage, 2 if turn else 1, collector.observe, batching))
        for done, batch in enumerate(batches, 1):
            self.run.lockstep.run(batch)
            if several:
                job.tick(ITERATIONS, turn, self.schedule.passes)
            else:
                job.tick(FEATURES.format(stage.name), done, len(batches))
        for site in collector.sites:
            self._solve(solver, site, collector.take(site))
            if not several:
                job.tick(SOLVING, len(self._solutions), len(self.run.lockstep.changes))

    def _sweep(self, solver: StageSolver, plan: Plan) -> None:
        """Run rows in step; they wait at each site until it is solved."""
        job, lockstep, stage, strategy = self.run.job, self.run.lockstep, plan.stage, plan.strategy
        batching = replace(self.batching, rows=plan.at_once)
        for site in self._solutions.keys() & set(stage.sites):  # of an attempt that ran out
            del self._solutions[site], lockstep.merged[site]
        offload = None
        if strategy.offloads is not None:
            modules = list(job.host.sites().values())
            offload = ActivationOffload(HostPool(strategy.offloads, bits=strategy.bits), modules)
        sampled = sampled_rows(stage, batching.thresholds)
        collector = Collector(
            solver,
            sampled,
            narrow=strategy.barriers is not None,
            aside=nullcontext if offload is None else offload.aside,
        )
        # With every strategy, so that all give the same result.
        batches = list(micro_batches(stage, 2, collector.observe, batching, sampled))
        last = set[str]() if stage.feeds_next else set(stage.sites)
        with ExitStack() as stack:
            stack.enter_context(lockstep.in_barriers(strategy.barriers or Barriers()))
            if offload is not None:
                stack.callback(offload.place.close)
                stack.enter_context(offload)
            stack.callback(collector.forget)  # otherwise everything it holds would be put back
            for level in stack.enter_context(closing(lockstep.sweep(batches, offload))):
                for site in level:
                    lockstep.merged[site] = self._solve(solver, site, collector.take(site))
                    job.tick(SOLVING, len(self._solutions), len(lockstep.changes))
                if last and last <= lockstep.merged.keys():
                    break

    def _solve(self, solver: StageSolver, site: str, reduction: Reduction) -> LowRank:
        try:
            self._solutions[site] = solver.solve(site, reduction)
        except SolveError as error:
            raise SolveError(f"Site {site}: {error}") from error
        return self._solutions[site].change


def _rowless(plan: Plan) -> Plan:
    """``plan`` without what its rows hold."""
    return replace(plan, stage=replace(plan.stage, forward=_released, final=None, mask=None))


def _released(rows: Sequence[Row], copies: int) -> None:
    raise AssertionError("the stage was made for its plan alone")


def _largest_change(old: Solutions, new: Solutions) -> float:
    """Maximum over sites of ‖ΔW_new − ΔW_old‖ / ‖ΔW_new‖, on factors."""
    largest = 0.0
    for site, solution in new.items():
        after, before = solution.change.to(torch.float64), old[site].change.to(torch.float64)
        norm = after.squared_norm()
        gap = max(0.0, concatenate([after, before.scaled(-1.0)]).squared_norm())
        largest = max(largest, (gap / norm) ** 0.5 if norm > 0 else 0.0)
    return largest
