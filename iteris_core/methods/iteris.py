"""IterIS (CVPR 2025, arXiv 2411.15231): least squares on the inputs the merged model really sees.

Two schedules reach the same fixed point (DESIGN 3.5). ``jacobi`` is the paper's Algorithm 1: solve
every site from the last merged model's features, ``iterations`` times. ``sweep`` solves every site
once, in execution order, on inputs that already passed the solved sites: one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..collector import Collector, SiteMoments
from ..errors import IterisError, SettingsError, SolveError
from ..hosts import Host, Stage
from ..lockstep import Lockstep, MicroBatch
from ..lora import LowRank, Rank, check_rank, concatenate
from ..report import SiteReport
from ..solve import Align, Balance, Solution, solve_site
from .registry import Merged, Task, method


@dataclass(frozen=True)
class IterisSettings:
    """Settings of ``iteris``.

    ``align``: what a site's output is held against, see :mod:`..solve`. ``schedule``: one sweep or
    ``iterations`` Jacobi iterations. ``balance``: λ_i from each LoRA's own outputs (``adapter``,
    eq. 8; ``full``, the layer's whole output), the number of ``tokens``, or ``none``. ``ridge``: α
    of eq. 7. ``rank``: at most this rank per site, or the
    share of output energy to keep, such as 0.99 (None: Σ r_i). ``micro_batch``: rows per forward
    (the result is the same for any). ``statistics``: dtype of the moments.
    """

    align: Align = "full"
    schedule: Literal["sweep", "jacobi"] = "sweep"
    iterations: int = 10
    balance: Balance = "tokens"
    ridge: float = 1e-5
    rank: Rank | None = None
    micro_batch: int = 32
    statistics: Literal["float32", "float64"] = "float32"

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
        for name in ("iterations", "micro_batch"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, not {getattr(self, name)}.")
        check_rank(self.rank)
        if not 0 <= self.ridge < 1:
            raise SettingsError(f"ridge must be in [0, 1), not {self.ridge}.")


@method("iteris", IterisSettings, needs_host=True)
def iteris(task: Task, settings: IterisSettings) -> Merged:
    """Least squares on the inputs that the merged model really sees (IterIS, CVPR 2025)."""
    assert task.host is not None
    wanted = set(task.references)
    with task.lockstep() as lockstep:
        samples = task.host.samples(
            task.concepts, wanted, task.calibration, lockstep, task.generator, task.tick
        )
        run = _Run(task, settings, lockstep)
        if settings.schedule == "sweep":
            run.sweep(task.host, samples)
        else:
            run.jacobi(task.host, samples)
    missed = wanted - set(run.solutions)
    if missed:
        raise IterisError(
            f"{len(missed)} sites were never reached by a forward, such as {min(missed)}; "
            "they cannot be merged by their features. Leave them out of the LoRAs."
        )
    return {
        site: (
            solution.change,
            SiteReport(
                solution.change.rank,
                solution.balance,
                solution.before,
                solution.after,
                solution.condition,
                solution.truncated,
            ),
        )
        for site, solution in run.solutions.items()
    }


class _Run:
    def __init__(self, task: Task, settings: IterisSettings, lockstep: Lockstep) -> None:
        self.task = task
        self.settings = settings
        self.lockstep = lockstep
        self.solutions: dict[str, Solution] = {}

    def sweep(self, host: Host, samples: Any) -> None:
        total = len(self.task.references)
        self.task.tick("solving sites", 0, total)
        for stage in host.stages(samples, set(self.task.references)):
            self._count_rows(stage)
            collector = self._collector()

            def solve(site: str, collector: Collector = collector) -> LowRank:
                solution = self._solve(site, collector.take(site))
                self.solutions[site] = solution
                self.task.tick("solving sites", len(self.solutions), total)
                return solution.change

            self.lockstep.sweep(list(self._batches(stage, 2, collector)), solve)

    def jacobi(self, host: Host, samples: Any) -> None:
        iterations = self.settings.iterations
        for iteration in range(iterations):
            # Before the first solve there is no merged model: X̃ = X (Algorithm 1, initial).
            copies = 1 if iteration == 0 else 2
            solved: dict[str, Solution] = {}
            self.task.tick("iterations", iteration, iterations)
            for stage in host.stages(samples, set(self.task.references)):
                if iteration == 0:
                    self._count_rows(stage)
                collector = self._collector()
                for batch in self._batches(stage, copies, collector):
                    self.lockstep.run(batch)
                    self.task.tick("iterations", iteration, iterations)
                for site in collector.sites:
                    solved[site] = self._solve(site, collector.take(site))
            if iteration:
                self.task.convergence.append(_largest_change(self.solutions, solved))
            self.solutions = solved
            self.lockstep.merged = {site: s.change for site, s in solved.items()}
        self.task.tick("iterations", iterations, iterations)

    def _count_rows(self, stage: Stage) -> None:
        self.task.rows = max(self.task.rows, len(stage.owners))

    def _collector(self) -> Collector:
        return Collector(
            self.task.references,
            full=self.settings.align == "full",
            dtype=getattr(torch, self.settings.statistics),
        )

    def _batches(self, stage: Stage, copies: int, collector: Collector) -> Iterator[MicroBatch]:
        for start in range(0, len(stage.owners), self.settings.micro_batch):
            rows = range(start, min(start + self.settings.micro_batch, len(stage.owners)))

            def run(rows: Sequence[int] = rows) -> None:
                stage.run(rows, copies)

            yield MicroBatch(run, [stage.owners[row] for row in rows], copies, collector)

    def _solve(self, site: str, moments: SiteMoments) -> Solution:
        settings = self.settings
        try:
            return solve_site(
                self.task.references[site],
                moments.shared,
                moments.targets,
                self.task.weights,
                align=settings.align,
                balance=settings.balance,
                ridge=settings.ridge,
                rank=settings.rank,
            )
        except SolveError as error:
            raise SolveError(f"Site {site}: {error}") from error


def _largest_change(old: dict[str, Solution], new: dict[str, Solution]) -> float:
    """max over sites of ‖ΔW_new − ΔW_old‖ / ‖ΔW_new‖, on factors."""
    largest = 0.0
    for site, solution in new.items():
        after, before = solution.change.to(torch.float64), old[site].change.to(torch.float64)
        norm = after.squared_norm()
        gap = max(0.0, concatenate([after, before.scaled(-1.0)]).squared_norm())
        largest = max(largest, (gap / norm) ** 0.5 if norm > 0 else 0.0)
    return largest
