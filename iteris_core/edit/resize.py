"""``resize_lora``: reduces a LoRA's rank while preserving its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ..calibration_prompts import CAPTIONS
from ..concepts import Calibration, Concept
from ..errors import MismatchError
from ..hosts.learned import embedding_triggers
from ..hosts.protocol import Host
from ..lora import Lora, LowRank
from ..passes.batches import ExecutionConfig
from ..passes.changes import changes_of, check_sites
from ..passes.job import Job, Run
from ..passes.preflight import unmergeable_sites
from ..passes.sweep import solve_sites
from ..progress import Forecast, OnProgress
from ..solve.choose import POLICY
from ..solve.problem import RegressionSpec, Solution, StageSolver
from ..solve.ranks import Components, Target, kept, share_out, span
from .moments import Seen, calibration_of, look
from .vectors import with_vectors

STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Metadata that describe the original file's tensors."""


@dataclass(frozen=True)
class Resized:
    """``ranks`` by site, 0 if it is left out; ``kept`` is the share that remains of the LoRA's
    worth at its layers' outputs; ``by_weights`` are sites whose inputs were not observed."""

    lora: Lora
    ranks: Mapping[str, int]
    kept: float
    by_weights: tuple[str, ...] = ()

    def summary(self) -> str:
        used = [rank for rank in self.ranks.values() if rank]
        gone = len(self.ranks) - len(used)
        text = (
            f"{self.lora.name}: {span(used)} in {len(used)} layers"
            + (f", {gone} left out" if gone else "")
            + f"; {self.kept:.1%} of its effect on their outputs kept"
        )
        more = f" ({len(self.by_weights)} layers by weights alone)" if self.by_weights else ""
        return f"{text}{more}."


def resize_lora(
    concept: Concept | Lora,
    target: Target,
    host: Host | None = None,
    *,
    calibration: Calibration | Mapping[str, Any] | None = None,
    itemsize: int = 2,
    on_progress: OnProgress | None = None,
    memory_budget: int | Literal["free"] | None = "free",
) -> Resized:
    """Reduce a LoRA to ``target``, with ranks shared out over its layers by worth.

    With a ``host``, worths (:class:`..solve.ranks.Components`) come from the layers' inputs while
    the model runs on prompts that invoke the LoRA, twice as many if it has several concepts. A LoRA
    without trigger words runs on captions. Then every layer in turn is refitted at its rank to the
    LoRA's outputs, on inputs that passed through the earlier layers; this minimises E‖(W0 + ΔW)x −
    W0 x̃ − ΔW_r x̃‖². Without a host, worths come from the weights' singular values, assuming equal
    output size for all layers.

    ``itemsize`` is the bytes per number in the file, for a target in megabytes. The base model is
    bit-identical afterwards. Raises :class:`IterisError` for a LoRA that does not fit the host.
    """
    if isinstance(concept, Lora):
        concept = Concept(concept)
    lora = concept.lora
    if lora is None:
        raise MismatchError("There is no LoRA to resize: the concept has none.")
    if host is None:
        found = {site: Components.of(change) for site, change in lora.sites.items()}
        ranks = share_out(found, target, itemsize)
        cut = {site: one.at(ranks[site]) for site, one in found.items() if ranks[site]}
        return Resized(_with(lora, cut), ranks, kept(found, ranks))
    if not concept.phrases and concept.prompts is None and concept.inputs is None:
        concept = replace(concept, prompts=CAPTIONS)

    concept = replace(concept, strength=1.0, text_strength=None, weight=1.0)
    chosen = calibration_of(calibration)
    if len(concept.phrases) > 1:
        chosen = replace(chosen, samples=2 * chosen.samples)
    generator = torch.Generator().manual_seed(chosen.seed)
    eta = Forecast(on_progress)
    tick = eta.tick
    job = Job(host, [concept], changes_of([concept]), chosen, generator, tick,
              memory_budget=memory_budget, eta=eta)  # fmt: skip
    check_sites(host, job.changes)
    return _resized(job, lora, target, itemsize)


def _resized(job: Job, lora: Lora, target: Target, itemsize: int) -> Resized:
    host, concept, every = job.host, job.concepts[0], job.changes
    looked = unmergeable_sites(job, sweep=True)
    found: dict[str, Components] = {}

    def visit(site: str, seen: Seen) -> None:
        found[site] = Components.of(lora.sites[site], seen.root, seen.output)

    kept_sites = {site: some for site, some in every.items() if site not in looked.refused}
    job = replace(job, changes=kept_sites, joined=looked.joined)
    triggers = [embedding_triggers(concept)]
    with with_vectors(host, lora.vectors), host.activate(triggers), job.run() as run:
        if job.changes:
            look(run, visit)
        unseen = {site: Components.of(lora.sites[site]) for site in every if site not in found}
        found |= _as_worthy(unseen, found)
        ranks = share_out(found, target, itemsize)
        cut = {site: one.at(ranks[site]) for site, one in found.items() if ranks[site]}
        at = {site: rank for site, rank in ranks.items() if rank and site not in unseen}
        if at and any(rank < lora.sites[site].rank for site, rank in ranks.items()):
            cut |= fitted(job, run, at)
    return Resized(_with(lora, cut), ranks, kept(found, ranks), tuple(unseen))


def _as_worthy(
    unseen: Mapping[str, Components], found: Mapping[str, Components]
) -> dict[str, Components]:
    """Components of sites without observed inputs, at the mean worth of the other sites."""
    mean = sum(one.total for one in found.values()) / len(found) if found else 1.0
    return {
        site: replace(one, worths=one.worths * (mean / max(one.total, 1e-30)), total=mean)
        for site, one in unseen.items()
    }


def fitted(job: Job, run: Run, ranks: Mapping[str, int]) -> dict[str, LowRank]:
    """The sites in ``ranks``, fitted at these ranks to their whole output under all of the job's
    changes, in a sweep on inputs that passed through earlier sites; other sites keep no change."""
    size = job.calibration.samples, job.calibration.rows_each, 1
    fit = RegressionSpec(job.weights, POLICY.ridge_for(*size), residuals=False)
    fits = {site: replace(fit, rank=rank) for site, rank in ranks.items()}
    solver = StageSolver(
        begin=lambda opening: POLICY.choose(opening, fit, "output", torch.float32),
        solve=lambda site, reduction: (
            reduction.solve(fits[site])
            if site in fits
            else Solution(reduction.changes.like.scaled(0))
        ),
        bytes=lambda site, sweep: POLICY.bytes(job.changes[site], fit, "output", 4, sweep=sweep),
    )
    batching = ExecutionConfig(32, "enough", job.calibration.seed)
    solutions, _ = solve_sites(run, lambda _: solver, batching)
    return {site: solutions[site].change for site in ranks}


def _with(lora: Lora, sites: Mapping[str, LowRank]) -> Lora:
    metadata = {key: value for key, value in lora.metadata.items() if key not in STALE}
    return replace(lora, sites=sites, metadata=metadata, scales={})
