"""``resize_lora``: reduces a LoRA's rank while preserving its outputs. Extracting shares its job,
moments of layers, fit at given ranks, and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..activations.tokens import Observation
from ..calibration import Calibration
from ..calibration_prompts import CAPTIONS
from ..concepts import Concept
from ..errors import LoraFileError, MismatchError
from ..hosts.learned import embedding_triggers
from ..hosts.protocol import Host
from ..lora import Lora, LowRank, SiteChanges
from ..passes.batches import REFERENCE, ExecutionConfig
from ..passes.changes import changes_of, check_sites
from ..passes.job import Job, Run
from ..passes.preflight import unmergeable_sites
from ..passes.sweep import Passes
from ..progress import Forecast, OnProgress
from ..report.provenance import with_recipe
from ..settings import Budget, budget_of
from ..solve.choose import THRESHOLDS
from ..solve.inputs import InputMoments
from ..solve.problem import (
    MemoryEstimate,
    Reduction,
    RegressionSpec,
    SiteContext,
    Solution,
    StageSolver,
)
from ..solve.ranks import Components
from .target import Target, share_out, worth_share

STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Metadata that describe the original file's tensors."""


def resize_lora(
    concept: Concept | Lora,
    target: Target,
    host: Host | None = None,
    *,
    calibration: Calibration | Mapping[str, Any] | None = None,
    itemsize: int = 2,
    on_progress: OnProgress | None = None,
    memory_budget: Budget = "free",
) -> Reduced:
    """Reduce a LoRA to ``target``, with ranks shared out over its layers by worth.

    With a ``host``, worths (:class:`..solve.ranks.Components`) come from the layers' inputs while
    the model runs on prompts that invoke the LoRA, twice as many if it has several concepts. A LoRA
    without trigger words runs on captions. Then every layer in turn is refitted at its rank to the
    LoRA's outputs, on inputs that passed through the earlier layers; this minimises E‖(W0 + ΔW)x −
    W0 x̃ − ΔW_r x̃‖². Without a host, worths come from the weights' singular values, assuming equal
    output size for all layers.

    The base model is bit-identical afterwards.

    :param concept: the LoRA, or a concept with its words; strengths and weight do not count.
    :param target: how small the file is to be.
    :param host: runs the base model.
    :param calibration: how to collect features: settings by name, or a whole :class:`Calibration`.
    :param itemsize: bytes per number in the file, for a target in megabytes.
    :param on_progress: called at every step with a :class:`.progress.Progress`.
    :param memory_budget: bytes that may be used beyond the model, as in :func:`.merge_loras`.
    :raises IterisError: for a LoRA that does not fit the host.
    """
    if isinstance(concept, Lora):
        concept = Concept(concept)
    lora = concept.lora
    if lora is None:
        raise MismatchError("There is no LoRA to resize: the concept has none.")
    if not any(bool(change.up.any() and change.down.any()) for change in lora.sites.values()):
        raise LoraFileError(
            f"{lora.source or lora.name} changes nothing: all of it is zero, so there is nothing "
            "to resize."
        )
    if host is None:
        components = {site: Components.of(change) for site, change in lora.sites.items()}
        return _reduced(lora, components, share_out(components, target, itemsize), target)
    if concept.is_wordless:
        concept = replace(concept, prompts=CAPTIONS)
    concept = replace(concept, strength=1.0, text_strength=None, weight=1.0)
    job = job_of(host, concept, changes_of([concept]), calibration, on_progress, memory_budget)
    changes = {site: of for site, of in job.changes.items() if site not in job.trace.refused}
    job = replace(job, changes=changes)

    triggers = [embedding_triggers(job.concepts[0])]
    with host.activate(triggers), job.run() as run:
        components = look(
            run, lambda site, root, output: Components.of(lora.sites[site], root, output)
        )
        # Sites without observed inputs have the mean worth of the others.
        totals = [of.total for of in components.values()]
        mean = sum(totals) / len(totals) if totals else 1.0
        unseen = [site for site in lora.sites if site not in components]
        for site in unseen:
            of = Components.of(lora.sites[site])
            worths = of.worths * (mean / max(of.total, 1e-30))
            components[site] = replace(of, worths=worths, total=mean)
        ranks = share_out(components, target, itemsize)
        reduced = _reduced(lora, components, ranks, target)
        to_fit = {site: rank for site, rank in ranks.items() if rank and site not in unseen}
        if to_fit and any(rank < lora.sites[site].rank for site, rank in ranks.items()):
            sites = {**reduced.lora.sites, **fitted(run, to_fit)}
            reduced = replace(reduced, lora=replace(reduced.lora, sites=sites))
    return replace(reduced, by_weights=tuple(unseen))


def _reduced(
    lora: Lora, components: Mapping[str, Components], ranks: Mapping[str, int], target: Target
) -> Reduced:
    """``lora`` with the first components of every site, and metadata that are still true; the
    recipe of a merged one says that it was cut, and how."""
    sites = {site: of.at(ranks[site]) for site, of in components.items() if ranks[site]}
    metadata = {key: value for key, value in lora.metadata.items() if key not in STALE}
    cut = {name: value for name, value in vars(target).items() if value is not None}
    cut |= {name: lora.reading[name] for name in ("blocks", "layers") if name in lora.reading}
    lora = with_recipe(replace(lora, sites=sites, metadata=metadata), cut=cut)
    return Reduced(lora, ranks, worth_share(components, ranks))


_SPREAD = 0.1
"""Share of the mean input energy added to every direction of a layer's inputs, so that directions
without data still count a little. Chosen on two of the toybox's own concepts."""


@dataclass(frozen=True)
class Reduced:
    """A LoRA at its ``ranks`` by site, 0 if the site is left out.

    ``kept`` is the share that remains of its worth at its layers' outputs; ``by_weights`` are sites
    whose inputs were not observed. Of an extracted LoRA, ``error`` is the share of the fine-tune's
    effect that it lacks: ‖f_LoRA − f_tuned‖ / ‖f_base − f_tuned‖ of final outputs, on rows to which
    nothing was fitted; or ``uncompared`` says why that is not known.
    """

    lora: Lora
    ranks: Mapping[str, int]
    kept: float
    by_weights: tuple[str, ...] = ()
    error: float | None = None
    uncompared: str = ""

    def summary(self) -> str:
        """A readable line: ranks, layers left out, what is kept."""
        used = sorted(rank for rank in self.ranks.values() if rank)
        left_out = len(self.ranks) - len(used)
        ranks = f"rank {used[0]}" if used[0] == used[-1] else f"ranks {used[0]} to {used[-1]}"
        text = f"{self.lora.name}: {ranks} in {len(used)} layers"
        text += f", {left_out} left out" if left_out else ""
        text += f"; {self.kept:.1%} of its effect on their outputs kept"
        if self.by_weights:
            text += f" ({len(self.by_weights)} layers by weights alone)"
        if self.error is not None:
            text += f"; error {self.error:.1%} of what the fine-tune changes"
        if self.uncompared:
            text += f"; not compared with the fine-tune: {self.uncompared.rstrip('.')}"
        return f"{text}."

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        report = {"kept": self.kept, "ranks": self.ranks, "by_weights": list(self.by_weights)}
        more = {"error": self.error, "uncompared": self.uncompared or None}
        return {**report, **{name: value for name, value in more.items() if value is not None}}


def job_of(
    host: Host,
    concept: Concept,
    changes: Mapping[str, SiteChanges],
    calibration: Calibration | Mapping[str, Any] | None,
    on_progress: OnProgress | None,
    memory_budget: Budget,
) -> Job:
    """A job that runs the rows of one ``concept`` at its strength on a ``host`` with its
    ``changes``, twice as many if it has several phrases, and the host's trace. ``calibration`` is a
    whole one, or values over the defaults by name."""
    check_sites(host, changes)
    if not isinstance(calibration, Calibration):
        calibration = Calibration.from_mapping(calibration or {})
    calibration = replace(calibration, conditions=0.0).settled(1, pictures=True)
    if len(concept.phrases) > 1:
        calibration = replace(calibration, samples=2 * calibration.samples)
    eta, generator = Forecast(on_progress), torch.Generator().manual_seed(calibration.seed)
    budget = budget_of(memory_budget)
    job = Job(
        host, [concept], changes, calibration, generator, eta.tick, memory_budget=budget, eta=eta
    )
    return replace(job, trace=unmergeable_sites(job, sweep=True))


class _Moments(Reduction):
    """Σ x xᵀ and Σ ‖y‖² over the single concept's rows."""

    def __init__(self, context: SiteContext) -> None:
        super().__init__(context.changes)
        inputs, self._adds = context.share(InputMoments)
        self.inputs: InputMoments = inputs
        self._output = torch.zeros(2, dtype=torch.float64)

    def add(self, tokens: Observation) -> None:
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


def look(run: Run, of: Callable[[str, Tensor | None, float], Components]) -> dict[str, Components]:
    """Run the rows of one concept under its LoRA; returns what ``of(site, L, E‖y‖²)`` makes of
    every site of its changes. L, (in, in), float64, is lower triangular with L Lᵀ = E[x xᵀ] +
    0.1 E‖x‖²/in I for the site's tokens x, None if all are zero; y are its whole outputs."""
    components: dict[str, Components] = {}

    def solve(site: str, reduction: Reduction) -> Solution:
        assert isinstance(reduction, _Moments)
        components[site] = of(site, *reduction.seen())
        return Solution(reduction.changes.like)

    def size(site: str, sweep: bool) -> MemoryEstimate:
        square = run.lockstep.changes[site].shape[1] ** 2
        return MemoryEstimate(4 * square, 16 * square, 0, 4 * square)

    if run.lockstep.changes:
        solver = StageSolver(begin=_Moments, solve=solve, bytes=size)
        Passes(run, lambda _: solver, ExecutionConfig(32), REFERENCE).solve()
    return components


def fitted(run: Run, ranks: Mapping[str, int]) -> dict[str, LowRank]:
    """The sites in ``ranks``, fitted to their whole output in a sweep; others keep no change."""
    job = run.job
    size = job.calibration.samples, job.calibration.rows_each, 1
    fit = RegressionSpec(job.weights, THRESHOLDS.ridge_for(*size)[0], residuals=False)
    fits = {site: replace(fit, rank=rank) for site, rank in ranks.items()}
    solver = StageSolver(
        begin=lambda context: THRESHOLDS.choose(context, fit, "output"),
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
    merged = Passes(run, lambda _: solver, batching).solve()
    return {site: merged.sites[site].change for site in ranks}
