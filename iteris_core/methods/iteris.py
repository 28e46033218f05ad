"""IterIS (CVPR 2025, arXiv 2411.15231): least squares on the inputs the merged model really sees.

Two schedules reach the same fixed point (DESIGN 3.5). ``jacobi`` is the paper's Algorithm 1: solve
every site from the last merged model's features, ``iterations`` times. ``sweep`` solves every site
once, in execution order, on inputs that already passed the solved sites: one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ..activations.collect import Collector, SiteMoments
from ..errors import IterisError, SettingsError, SolveError
from ..lora import LowRank, Rank, check_rank, concatenate
from ..passes.batches import Batching, micro_batches
from ..passes.budget import plan
from ..passes.job import Job
from ..passes.loops import sweep_pass
from ..report.report import SiteReport
from ..solve.rows import SiteRows, solve_rows
from ..solve.site import Align, Balance, Solution, solve_site
from .polish import polish
from .registry import Merged, method
from .repair import add_repairs, at_all_inputs, at_inputs

_RIDGE = 1e-6
_ENOUGH = 50  # prompts a concept; with fewer a fit follows the sample, and wants more ridge


@dataclass(frozen=True)
class IterisSettings:
    """Settings of ``iteris``.

    ``align``: what a site's output is held against, see :mod:`..solve`. ``schedule``: one sweep or
    ``iterations`` Jacobi iterations. ``balance``: λ_i from each LoRA's own outputs (``adapter``,
    eq. 8; ``full``, the layer's whole output), the number of ``tokens``, or ``none``. ``ridge``: α
    of eq. 7 (None: 1e-6, and more for less than 50 samples). ``shrink``: what off-diagonal entries
    of the moments are multiplied by, see :mod:`..solve` (1: nothing; less where a concept has not
    many more tokens than a site has inputs). ``rank``: at most this rank per site, or the share of
    output energy to keep, such as 0.99 (None: Σ r_i). ``micro_batch``: rows per forward (the result
    is the same for any). ``row_tokens``: at most so many tokens of every row are counted, chosen at
    random by the calibration's seed (None: of pictures 128, or what gives a concept 32 for each
    of a site's inputs; of texts all). ``focus``: how much more places of a picture count where a
    LoRA acts, see :mod:`..focus` (None: 1 - 2 / concepts, since two hardly compete).
    ``statistics``: dtype of the moments. ``repair``: hold residual streams too, and change sites
    that no LoRA changes to that end, see :mod:`.repair` (``align="full"`` only). ``repair_inputs``:
    the share of a feed-forward's hidden units that a repair may use (None: half for two concepts
    of a model that makes pictures, else all).
    ``polish_steps``: Adam steps at ``polish_rate`` on the final output, see :mod:`.polish` (0: the
    closed form alone).
    """

    align: Align = "full"
    schedule: Literal["sweep", "jacobi"] = "sweep"
    iterations: int = 10
    balance: Balance = "tokens"
    ridge: float | None = None
    shrink: float = 1.0
    rank: Rank | None = None
    micro_batch: int = 32
    row_tokens: int | None = None
    focus: float | None = None
    statistics: Literal["float32", "float64"] = "float32"
    repair: bool = True
    repair_inputs: float | None = None
    polish_steps: int = 0
    polish_rate: float = 5e-4

    def __post_init__(self) -> None:
        for name, choices in (
            ("align", ("adapter", "full")),
            ("schedule", ("sweep", "jacobi")),
            ("balance", ("adapter", "tokens", "full", "none")),
            ("statistics", ("float32", "float64")),
        ):
            if getattr(self, name) not in choices:
                raise SettingsError(
                    f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}."
                )
        for name in ("iterations", "micro_batch", "row_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be at least 1, not {value}.")
        check_rank(self.rank)
        if self.polish_steps < 0 or not self.polish_rate > 0:
            raise SettingsError("polish_steps must be 0 or more and polish_rate above 0.")
        if self.ridge is not None and not 0 <= self.ridge < 1:
            raise SettingsError(f"ridge must be in [0, 1), not {self.ridge}.")
        if self.focus is not None and not 0 <= self.focus <= 1:
            raise SettingsError(f"focus must be in [0, 1], not {self.focus}.")
        if not 0 < self.shrink <= 1:
            raise SettingsError(f"shrink must be in (0, 1], not {self.shrink}.")
        if self.repair_inputs is not None and not 0 < self.repair_inputs <= 1:
            raise SettingsError(f"repair_inputs must be in (0, 1], not {self.repair_inputs}.")


@method("iteris", IterisSettings, needs_host=True)
def iteris(job: Job, settings: IterisSettings) -> Merged:
    """Least squares on the inputs that the merged model really sees (IterIS, CVPR 2025)."""
    if settings.repair and settings.align == "full":
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
        site: (changes[site], SiteReport.of(solution, repair=site in job.repairs))
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


class _Run:
    def __init__(self, job: Job, settings: IterisSettings) -> None:
        self.job = job
        self.settings = settings
        focus = settings.focus
        if focus is None:
            focus = max(0.0, 1 - 2 / len(job.concepts))
        self.acting: Set[str] = set()
        if focus:
            assert job.host is not None
            own = set(job.references) - set(job.repairs)
            self.acting = own & set(job.host.streams(own))
        few = max(1.0, _ENOUGH / job.calibration.samples)
        self.ridge = _RIDGE * few**2 if settings.ridge is None else settings.ridge
        self.batching = Batching(
            settings.micro_batch,
            settings.row_tokens or "enough",
            job.calibration.seed,
            focus=focus,
            cross=settings.align != "full",
            itemsize=4 if settings.statistics == "float32" else 8,
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
            job.tick("iterations", iterations, iterations)

    def _collector(self, *, sweep: bool = False) -> Collector:
        rank = self.settings.rank
        return Collector(
            self.job.references,
            full=self.settings.align == "full",
            balance=self.settings.balance,
            dtype=getattr(torch, self.settings.statistics),
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
            "balance": settings.balance,
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
                    align=settings.align,
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
