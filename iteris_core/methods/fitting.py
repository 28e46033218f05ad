"""Which sites ``iteris`` adds to remove drift, and how large a change may be.

When LoRAs want different outputs for similar inputs, least squares cannot satisfy all of them. The
rest stays in the residual stream as drift, and no later site that aligns its own output sees it.
With the host's ``streams``, a site's target includes that drift (h_i is LoRA i's stream and h̃_i
that of its merged rows):

    T_i = (W0 + ΔW_i) X_i - W0 X̃_i + h_i - h̃_i.

A block's feed-forward output has the widest inputs and removes most of the drift, whether or not
the LoRAs change it; if they do not, ΔW_i = 0. It has many similar hidden units, so a part of them
repairs nearly as well, and the moments of half of them cost a quarter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..activations.site import site_of
from ..activations.streams import Source, Stream
from ..hosts.protocol import Stage
from ..lora import SiteChanges
from ..passes.job import Job

Repairs = Mapping[str, Tensor | None]
"""Repair sites, and which of their inputs they may use (None: all)."""


def with_repairs(job: Job) -> tuple[Job, Repairs]:
    """``job`` with the host's streams and repair sites, and these sites. On image models repair
    sites with more inputs than outputs use a share of them for two LoRAs. Each concept that changes
    a component gets a zero change there, at its largest rank in that component. A single concept
    leaves no drift."""
    if len(job.concepts) < 2:
        return job, {}
    share = job.thresholds.repair_share if job.host.pictures and job.loras == 2 else 1.0
    streams, modules = streams_of(job), job.host.sites()
    ranks: dict[str, list[int]] = {}  # component → the largest rank of every concept there
    for site, some in job.changes.items():
        largest = ranks.setdefault(site.partition(".")[0], [0] * len(some.by_concept))
        for concept, change in some.own.items():
            largest[concept] = max(largest[concept], change.rank)
    first = next(iter(job.changes.values()))
    like, sums = first.like.up, first.sums
    added: dict[str, SiteChanges] = {}
    inputs: dict[str, Tensor | None] = {}
    for name in streams:
        if name not in job.changes:
            site = site_of(name, modules[name])
            zeros = (
                site.zero(rank).to(like.dtype, like.device) if rank else None
                for rank in ranks[name.partition(".")[0]]
            )
            added[name] = SiteChanges(tuple(zeros), sums)
            out, width = site.shape
            count = min(max(1, round(width * share)), job.thresholds.repair_width)
            every = width <= out or count == width
            inputs[name] = None if every else torch.arange(count) * width // count  # evenly
    return replace(job, changes={**job.changes, **added}, streams=streams), inputs


def streams_of(job: Job) -> dict[str, Stream]:
    """The host's residual streams, and those that a forward showed of other components."""
    own = job.host.streams(set(job.changes))
    known = {site: Stream(Source(module)) for site, module in own.items()}
    components = {site.partition(".")[0] for site in known}
    return {
        s: of for s, of in job.trace.streams.items() if s.partition(".")[0] not in components
    } | known


def notes_on(streams: Mapping[str, Stream], changed: Iterable[str]) -> list[str]:
    """For each component with ``changed`` sites, at how many layers drift is repaired, by name."""
    notes: list[str] = []
    for component in sorted({site.partition(".")[0] for site in changed}):
        own = [stream for site, stream in streams.items() if site.startswith(f"{component}.")]
        gated = sum(stream.constant is not None for stream in own)
        where = f"at {len(own)} layers" + (f", {gated} of them behind gates" if gated else "")
        none = "nowhere, since no layer was recognised as adding to a residual stream"
        notes.append(f"{component}: repaired {where if own else none}")
    return notes


def bounds_of(job: Job, bound: float | None, stage: Stage) -> dict[str, float]:
    """The largest ‖ΔW‖_F of each of the stage's sites: ``bound`` times ‖W0‖_F, since a change as
    large as the layer's own weight at most doubles what a shift of its inputs does (None: what
    :class:`Thresholds` says for its ``samples`` of each LoRA, and no more than ``growth`` times
    what the LoRAs have there together, (Σ ‖ΔW_i‖²)^½; 0: no bound). Never less than that, so that a
    single one stays itself."""
    growth = math.inf
    if bound is None:
        chosen, samples = job.thresholds, stage.samples or job.calibration.samples
        rows = samples * (job.calibration.rows_each / 4) ** 0.25
        few = min(1.0, (rows / chosen.bound_samples) ** (1 / 3))  # free in more directions
        # What LoRAs have together grows alike with their number.
        bound, growth = few * chosen.bound * math.sqrt(max(job.loras, 1)), few * chosen.growth
    bounds: dict[str, float] = {}
    for site in stage.sites:
        changes = job.changes[site]
        together = math.sqrt(sum(change.squared_norm() for change in changes.own.values()))
        most = bound * job.trace.norms[site]
        if together:  # not at a repair
            most = min(most, growth * together)
        bounds[site] = max(most, together) if bound else math.inf
    return bounds
