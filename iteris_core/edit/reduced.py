"""What resizing and extracting share: a job for one LoRA, the moments of layers, the fit at given
ranks, and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..concepts import Calibration, Concept
from ..hosts.protocol import Host
from ..lora import Lora, LowRank, SiteChanges
from ..passes.batches import REFERENCE, ExecutionConfig
from ..passes.job import Budget, Job, Run
from ..passes.sweep import solve_sites
from ..progress import Forecast, OnProgress
from ..solve.choose import THRESHOLDS
from ..solve.inputs import InputMoments
from ..solve.problem import (
    MemoryEstimate,
    Reduction,
    RegressionSpec,
    SiteContext,
    Solution,
    StageSolver,
    Tokens,
)
from ..solve.ranks import span

_T = TypeVar("_T")
_SPREAD = 0.1
"""Share of the mean input energy added to every direction of a layer's inputs, so that directions
without data still count a little. Chosen on two of the toybox's own concepts."""


@dataclass(frozen=True)
class Reduced:
    """A LoRA at its ``ranks`` by site, 0 if the site is left out.

    ``kept`` is the share that remains of its worth at its layers' outputs; ``by_weights`` are sites
    whose inputs were not observed. Of an extracted LoRA, ``error`` is the share of the fine-tune's
    effect that it lacks: ‖f_LoRA − f_tuned‖ / ‖f_base − f_tuned‖ of final outputs, on rows to which
    nothing was fitted. ``left`` are differing parameters without a place in the file: embeddings,
    and in many layouts biases and normalisations.
    """

    lora: Lora
    ranks: Mapping[str, int]
    kept: float
    by_weights: tuple[str, ...] = ()
    error: float | None = None
    left: tuple[str, ...] = ()

    def summary(self) -> str:
        used = [rank for rank in self.ranks.values() if rank]
        gone, exact = len(self.ranks) - len(used), len(self.lora.vectors)
        text = f"{self.lora.name}: {span(used)} in {len(used)} layers"
        text += f", {gone} left out" if gone else ""
        text += f", {exact} biases and normalisations exactly" if exact else ""
        text += f"; {self.kept:.1%} of its effect on their outputs kept"
        if self.by_weights:
            text += f" ({len(self.by_weights)} layers by weights alone)"
        if self.error is not None:
            text += f"; error {self.error:.1%} of what the fine-tune changes"
        if self.left:
            text += (
                f". {len(self.left)} differing parameters have no place in the file (biases, "
                f"normalisations, embeddings), such as {self.left[0]}"
            )
        return f"{text}."

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        report = {"kept": self.kept, "ranks": self.ranks, "by_weights": list(self.by_weights)}
        if self.error is None:
            return report
        exact = sorted(self.lora.vectors)
        return {**report, "error": self.error, "exact": exact, "left": list(self.left)}


def calibration_of(given: Calibration | Mapping[str, Any] | None) -> Calibration:
    """The calibration for one LoRA at its strength: a whole one, or the defaults with the ``given``
    values by name."""
    whole = given if isinstance(given, Calibration) else Calibration.from_mapping(given or {})
    return replace(whole, conditions=0.0).settled(1)


def job_of(
    host: Host,
    concept: Concept,
    changes: Mapping[str, SiteChanges],
    calibration: Calibration,
    on_progress: OnProgress | None,
    memory_budget: Budget,
) -> Job:
    """A job that runs the rows of one ``concept`` on a ``host`` with its ``changes``."""
    eta, generator = Forecast(on_progress), torch.Generator().manual_seed(calibration.seed)
    return Job(
        host,
        [concept],
        changes,
        calibration,
        generator,
        eta.tick,
        memory_budget=memory_budget,
        eta=eta,
    )


class _Moments(Reduction):
    """Σ x xᵀ and Σ ‖y‖² over the single concept's rows."""

    def __init__(self, context: SiteContext) -> None:
        super().__init__(context.changes)
        inputs, self._adds = context.share(InputMoments)
        self.inputs: InputMoments = inputs
        self._output = torch.zeros(2, dtype=torch.float64)

    def add(self, tokens: Tokens) -> None:
        if self._adds:
            self.inputs.add(0, tokens.merged)
        output = tokens.output
        self._output += torch.tensor([float(output.float().square().sum()), len(output)])

    def solve(self, fit: object) -> Solution:
        return Solution(self.changes.like)

    def seen(self) -> tuple[Tensor | None, float]:
        """L and E‖y‖², as for :func:`look`."""
        self.inputs.complete()
        energy, count = self._output.tolist()
        moment = self.inputs.own[0].double() / max(count, 1.0)
        spread, output = _SPREAD * float(moment.diagonal().mean()), energy / max(count, 1.0)
        if spread <= 0:
            return None, output
        moment.diagonal().add_(spread)
        return torch.linalg.cholesky(moment), output


def look(run: Run, of: Callable[[str, Tensor | None, float], _T]) -> dict[str, _T]:
    """Run the rows of one concept under its LoRA; returns what ``of(site, L, E‖y‖²)`` makes of
    every site of its changes. L, (in, in), float64, is lower triangular with L Lᵀ = E[x xᵀ] +
    0.1 E‖x‖²/in I for the site's tokens x, None if all are zero; y are its whole outputs."""
    found: dict[str, _T] = {}

    def solve(site: str, reduction: Reduction) -> Solution:
        assert isinstance(reduction, _Moments)
        found[site] = of(site, *reduction.seen())
        return Solution(reduction.changes.like)

    def size(site: str, sweep: bool) -> MemoryEstimate:
        square = run.lockstep.changes[site].shape[1] ** 2
        return MemoryEstimate(4 * square, 16 * square, 0, 4 * square)

    if run.lockstep.changes:
        solver = StageSolver(begin=_Moments, solve=solve, bytes=size)
        solve_sites(run, lambda _: solver, ExecutionConfig(32), REFERENCE)
    return found


def fitted(job: Job, run: Run, ranks: Mapping[str, int]) -> dict[str, LowRank]:
    """The sites in ``ranks``, fitted at these ranks to their whole output under all of the job's
    changes, in a sweep on inputs that passed through earlier sites; other sites keep no change."""
    size = job.calibration.samples, job.calibration.rows_each, 1
    fit = RegressionSpec(job.weights, THRESHOLDS.ridge_for(*size), residuals=False)
    fits = {site: replace(fit, rank=rank) for site, rank in ranks.items()}
    solver = StageSolver(
        begin=lambda context: THRESHOLDS.choose(context, fit, "output", torch.float32),
        solve=lambda site, reduction: (
            reduction.solve(fits[site])
            if site in fits
            else Solution(reduction.changes.like.scaled(0))
        ),
        bytes=lambda site, sweep: THRESHOLDS.bytes(
            job.changes[site], fit, "output", 4, sweep=sweep
        ),
    )
    batching = ExecutionConfig(32, "enough", job.calibration.seed)
    solutions, _ = solve_sites(run, lambda _: solver, batching)
    return {site: solutions[site].change for site in ranks}
