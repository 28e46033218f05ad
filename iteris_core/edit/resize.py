"""``resize_lora``: reduces a LoRA's rank while preserving its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from ..calibration_prompts import CAPTIONS
from ..concepts import Calibration, Concept
from ..errors import MismatchError
from ..hosts.learned import embedding_triggers
from ..hosts.protocol import Host
from ..lora import Lora
from ..passes.changes import changes_of, check_sites
from ..passes.job import Job
from ..passes.preflight import unmergeable_sites
from ..progress import OnProgress
from ..solve.ranks import Components, Target, kept, share_out
from .reduced import Reduced, calibration_of, fitted, job_of, look
from .vectors import with_vectors

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
    memory_budget: int | Literal["free"] | None = "free",
) -> Reduced:
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
        return _reduced(lora, found, share_out(found, target, itemsize))
    if not concept.phrases and concept.prompts is None and concept.inputs is None:
        concept = replace(concept, prompts=CAPTIONS)
    concept = replace(concept, strength=1.0, text_strength=None, weight=1.0)
    chosen = calibration_of(calibration)
    if len(concept.phrases) > 1:
        chosen = replace(chosen, samples=2 * chosen.samples)
    job = job_of(host, concept, changes_of([concept]), chosen, on_progress, memory_budget)
    check_sites(host, job.changes)
    return _by_outputs(job, lora, target, itemsize)


def _by_outputs(job: Job, lora: Lora, target: Target, itemsize: int) -> Reduced:
    looked, host = unmergeable_sites(job, sweep=True), job.host
    seen_sites = {site: some for site, some in job.changes.items() if site not in looked.refused}
    job = replace(job, changes=seen_sites, joined=looked.joined)

    def components(site: str, root: Tensor | None, output: float) -> Components:
        return Components.of(lora.sites[site], root, output)

    triggers = [embedding_triggers(job.concepts[0])]
    with with_vectors(host, lora.vectors), host.activate(triggers), job.run() as run:
        found = look(run, components)
        # Sites without observed inputs have the mean worth of the others.
        mean = sum(one.total for one in found.values()) / len(found) if found else 1.0
        unseen = {s: Components.of(lora.sites[s]) for s in lora.sites if s not in found}
        for site, one in unseen.items():
            worths = one.worths * (mean / max(one.total, 1e-30))
            found[site] = replace(one, worths=worths, total=mean)
        ranks = share_out(found, target, itemsize)
        made = _reduced(lora, found, ranks)
        at = {site: rank for site, rank in ranks.items() if rank and site not in unseen}
        if at and any(rank < lora.sites[site].rank for site, rank in ranks.items()):
            sites = {**made.lora.sites, **fitted(job, run, at)}
            made = replace(made, lora=replace(made.lora, sites=sites))
    return replace(made, by_weights=tuple(unseen))


def _reduced(lora: Lora, found: Mapping[str, Components], ranks: Mapping[str, int]) -> Reduced:
    """``lora`` with the first components of every site, and metadata that are still true."""
    sites = {site: one.at(ranks[site]) for site, one in found.items() if ranks[site]}
    metadata = {key: value for key, value in lora.metadata.items() if key not in STALE}
    made = replace(lora, sites=sites, metadata=metadata, scales={})
    return Reduced(made, ranks, kept(found, ranks))
