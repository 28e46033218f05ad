"""Runs over the model that methods share: reference rows alone, one sweep, or Jacobi iterations.

Each takes what a method does at the sites of a stage, a :class:`Reducing`, and gives every site's
solution, in execution order. A site that no forward reaches is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..activations.blocks import Levels
from ..activations.collect import StreamCollector, SweepCollector
from ..activations.host_memory import HostMemory
from ..activations.lockstep import Lockstep, greenlets
from ..activations.micro_batch import MicroBatch
from ..activations.parking import Parking
from ..errors import SiteError, SolveError
from ..hosts.protocol import Stage
from ..lora import LowRank, concatenate
from ..solve.problem import Begin, Bytes, Reduction, Solution, Work
from .batches import Batching, micro_batches, sampled_rows
from .budget import plan
from .fallback import within_memory
from .job import Job
from .outlook import Plans

Solutions = dict[str, Solution]


@dataclass(frozen=True)
class Reducing:
    """What a method does at the sites of a stage.

    ``begin`` makes a site's reduction, with moments in ``dtype``, and ``solve`` turns it into its
    change; ``bytes`` is what both take at a site, for the plan (``sweep``: whether forwards wait),
    and ``work`` the operations of both for so many tokens, which may be another site's as well.
    ``acting`` and ``inputs`` are as for :class:`..activations.collect.Collector`.
    """

    begin: Begin
    solve: Callable[[str, Reduction], Solution]
    bytes: Callable[[str, bool], Bytes]
    dtype: torch.dtype = torch.float32
    acting: Set[str] = frozenset()
    inputs: Mapping[str, Tensor] | None = None
    work: Callable[[str, int, bool, bool], Work] = lambda site, tokens, sweep, shares: Work({}, {})

    def named(self, site: str, reduction: Reduction) -> Solution:
        """``solve``, with the site's name in what it may raise."""
        try:
            return self.solve(site, reduction)
        except SolveError as error:
            raise SolveError(f"Site {site}: {error}") from error


ReducingOf = Callable[[Stage], Reducing]


def reference_pass(job: Job, reducing_of: ReducingOf, batching: Batching) -> Solutions:
    """Solve every site from its reference rows: X with each LoRA alone active."""
    solutions: Solutions = {}
    _expect(job, reducing_of, batching, sweep=False, copies=1)
    with job.lockstep() as lockstep:
        for stage in _stages(job, job.samples(lockstep)):
            stage, fitted, reducing = _planned(
                job, stage, lockstep, batching, reducing_of, copies=1, sweep=False
            )

            def run(
                fitted: Batching, stage: Stage = stage, reducing: Reducing = reducing
            ) -> StreamCollector:
                collector = _collector(job, reducing, StreamCollector)
                batches = list(micro_batches(stage, 1, collector, fitted, job.processes))
                job.outlook.begin(stage, fitted)
                for done, batch in enumerate(batches, 1):
                    lockstep.run(batch)
                    job.outlook.ran(stage, done, len(batches))
                    job.tick(f"features of the {stage.name}", done, len(batches))
                return collector

            collector, _ = within_memory(job, stage, fitted, run)
            for site in collector.sites:
                solutions[site] = reducing.named(site, collector.take(site))
                job.outlook.solved(stage, site)
                job.tick("solving sites", len(solutions), len(job.changes))
    return _complete(job, solutions)


def sweep_pass(job: Job, reducing_of: ReducingOf, batching: Batching) -> Solutions:
    """Solve every site once, in execution order, on inputs that passed the solved sites before."""
    greenlets()  # before samples are made
    solutions: Solutions = {}
    _expect(job, reducing_of, batching, sweep=True, copies=2)
    with job.lockstep() as lockstep:
        samples = job.samples(lockstep)
        job.tick("solving sites", 0, len(job.changes))
        for stage in _stages(job, samples):
            stage, fitted, reducing = _planned(
                job, stage, lockstep, batching, reducing_of, copies=2, sweep=True
            )

            def run(fitted: Batching, stage: Stage = stage, reducing: Reducing = reducing) -> None:
                for site in set(stage.sites) & solutions.keys():  # of a run that had no memory
                    del solutions[site], lockstep.merged[site]
                _sweep(job, lockstep, stage, fitted, reducing, solutions)

            within_memory(job, stage, fitted, run, lockstep)
    return _complete(job, solutions)


def _expect(
    job: Job,
    reducing_of: ReducingOf,
    batching: Batching,
    *,
    sweep: bool,
    copies: int,
    passes: int = 1,
) -> None:
    """Tell the job's outlook what is going to be done, before anything is."""
    plans = Plans(
        {site: changes.shape[1] for site, changes in job.changes.items()},
        lambda stage: reducing_of(stage).work,
        batching,
        sweep,
        copies,
        passes,
        job.processes.size,
    )
    job.outlook.expect(plans, job.loras, job.calibration)


def _planned(
    job: Job,
    stage: Stage,
    lockstep: Lockstep,
    batching: Batching,
    reducing_of: ReducingOf,
    *,
    copies: int,
    sweep: bool,
) -> tuple[Stage, Batching, Reducing]:
    """The rows of ``stage`` that fit, how they are batched, and what is done with those."""
    asked = reducing_of(stage)
    stage, fitted = plan(
        job, stage, lockstep, batching, asked.bytes, asked.dtype, copies=copies, sweep=sweep
    )
    job.ran.rows = max(job.ran.rows, len(stage.owners))
    return stage, fitted, reducing_of(stage)


def _sweep(
    job: Job,
    lockstep: Lockstep,
    stage: Stage,
    fitted: Batching,
    reducing: Reducing,
    solutions: Solutions,
) -> None:
    place = parking = None
    if fitted.waiting is not None:
        place = HostMemory(fitted.waiting.device, fitted.waiting.host_bytes)
        parking = Parking(place, modules=list(job.host.sites().values()))
    mine = job.processes.mine(len(stage.owners)) if stage.sites else ()
    sampled = sampled_rows(stage, fitted.policy)
    collector = _collector(
        job,
        reducing,
        SweepCollector,
        sampled=None if sampled is None else sampled & set(mine),
        narrow=fitted.levels is not None,
        rows=len(mine) if fitted.by_blocks else None,
        aside=nullcontext if parking is None else parking.aside,
    )

    def solve(site: str) -> LowRank:
        job.outlook.reached(stage, site)
        reduction = collector.take(site)
        job.outlook.reduced(stage, site)
        solutions[site] = reducing.named(site, reduction)
        job.outlook.solved(stage, site)
        job.tick("solving sites", len(solutions), len(job.changes))
        return solutions[site].change

    # In every way of running it, so that all give the same.
    batches = list(micro_batches(stage, 2, collector, fitted, job.processes, sampled))
    last = set[str]() if stage.feeds else set(stage.sites)
    with ExitStack() as stack:
        stack.enter_context(lockstep.in_levels(fitted.levels or Levels()))
        if fitted.waiting is not None and place is not None and parking is not None:
            stack.callback(place.close)
            parking.stay = _first(batches, fitted.waiting.on_device)
            stack.enter_context(parking)
        stack.callback(collector.forget)  # else all that it holds would be put back
        job.outlook.begin(stage, fitted)
        lockstep.sweep(batches, solve, last, parking)


def _first(batches: Sequence[MicroBatch], rows: int) -> set[int]:
    """The first batches, of so many rows together."""
    numbers: set[int] = set()
    for number, batch in enumerate(batches):
        rows -= len(batch.owners)
        if rows < 0:
            break
        numbers.add(number)
    return numbers


def jacobi(
    job: Job,
    reducing_of: ReducingOf,
    batching: Batching,
    iterations: int,
    tolerance: float | None,
) -> Solutions:
    """The paper's Algorithm 1: solve all sites from the last merged model's inputs, and again.

    Ends after ``iterations``, or when no site's change moves by more than ``tolerance`` of itself;
    ``job.ran.convergence`` has how much the one that moved most did.
    """
    solutions: Solutions = {}
    planned: dict[str, Batching] = {}
    _expect(job, reducing_of, batching, sweep=False, copies=2, passes=iterations)
    with job.lockstep() as lockstep:
        samples = job.samples(lockstep)
        for iteration in range(iterations):
            # Before the first solve there is no merged model: X̃ = X (Algorithm 1, initial).
            copies = 1 if iteration == 0 else 2
            latest: Solutions = {}
            job.tick("iterations", iteration, iterations)
            for stage in _stages(job, samples):
                job.ran.rows = max(job.ran.rows, len(stage.owners))
                reducing = reducing_of(stage)
                if stage.name not in planned:
                    _, planned[stage.name] = plan(
                        job,
                        stage,
                        lockstep,
                        batching,
                        reducing.bytes,
                        reducing.dtype,
                        copies=2,
                        sweep=False,
                        passes=iterations,
                    )

                def run(
                    fitted: Batching,
                    stage: Stage = stage,
                    reducing: Reducing = reducing,
                    copies: int = copies,
                    iteration: int = iteration,
                ) -> StreamCollector:
                    collector = _collector(job, reducing, StreamCollector)
                    batches = list(micro_batches(stage, copies, collector, fitted, job.processes))
                    if iteration == 0:
                        job.outlook.begin(stage, fitted)
                    for done, batch in enumerate(batches, 1):
                        lockstep.run(batch)
                        job.outlook.ran(stage, done, len(batches), iteration)
                        job.tick("iterations", iteration, iterations)
                    return collector

                collector, fitted = within_memory(
                    job, stage, planned.get(stage.name, batching), run
                )
                planned[stage.name] = fitted
                for site in collector.sites:
                    latest[site] = reducing.named(site, collector.take(site))
                    job.outlook.solved(stage, site, iteration)
            if iteration:
                job.ran.convergence.append(_largest_change(solutions, latest))
            solutions = latest
            lockstep.merged = {site: s.change for site, s in latest.items()}
            if tolerance is not None and iteration:
                settled = job.ran.convergence[-1] <= tolerance
                if job.processes.least(int(settled)):
                    break
        job.tick("iterations", iterations, iterations)
    return _complete(job, solutions)


def _stages(job: Job, samples: Any) -> Iterator[Stage]:
    for stage in job.host.stages(samples, set(job.changes)):
        if stage.samples is None:
            stage = replace(stage, samples=job.calibration.samples)
        yield stage


_Kind = TypeVar("_Kind", StreamCollector, SweepCollector)


def _collector(job: Job, reducing: Reducing, kind: type[_Kind], **more: Any) -> _Kind:
    return kind(
        job.changes,
        reducing.begin,
        dtype=reducing.dtype,
        processes=job.processes,
        acting=reducing.acting,
        inputs=reducing.inputs,
        **more,
    )


def _complete(job: Job, solutions: Solutions) -> Solutions:
    missed = sorted(set(job.changes) - set(solutions))
    if missed:
        raise SiteError(
            f"{len(missed)} sites were never reached by a forward, such as {missed[0]}; "
            "they cannot be merged by their features. Leave them out of the LoRAs."
        )
    return solutions


def _largest_change(old: Solutions, new: Solutions) -> float:
    """max over sites of ‖ΔW_new − ΔW_old‖ / ‖ΔW_new‖, on factors."""
    largest = 0.0
    for site, solution in new.items():
        after, before = solution.change.to(torch.float64), old[site].change.to(torch.float64)
        norm = after.squared_norm()
        gap = max(0.0, concatenate([after, before.scaled(-1.0)]).squared_norm())
        largest = max(largest, (gap / norm) ** 0.5 if norm > 0 else 0.0)
    return largest
