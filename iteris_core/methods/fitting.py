"""How ``iteris`` fits each site; and the sites that no LoRA changes, added to remove drift.

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
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from ..activations.site import site_of
from ..activations.streams import Source, Stream
from ..hosts.protocol import Stage
from ..lora import LowRank, SiteChanges
from ..passes.job import Job
from ..solve.problem import Reduction, RegressionSpec, Solution, StageSolver
from .iteris_settings import IterisSettings

Repairs = Mapping[str, Tensor | None]
"""Repair sites, and which of their inputs they may use (None: all)."""


def with_repairs(job: Job, share: float | None = None) -> tuple[Job, Repairs]:
    """``job`` with the host's streams and repair sites, and these sites.

    Repair sites with more inputs than outputs may use this ``share`` of their inputs (None: as
    many as the thresholds say for so many LoRAs). Each concept that changes a component gets a zero
    change there, at its largest rank in that component. A single concept leaves no drift.
    """
    if len(job.concepts) < 2:
        return job, {}
    if share is None:
        share = job.thresholds.repair_inputs_for(job.loras, job.host.pictures)
    streams = streams_of(job)
    ranks = _largest_ranks(job.changes)
    modules = job.host.sites()
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
            inputs[name] = _evenly(*site.shape, share, job.thresholds.repair_width)
    return replace(job, changes={**job.changes, **added}, streams=streams), inputs


def streams_of(job: Job) -> dict[str, Stream]:
    """The host's residual streams, and those that a forward showed of other components."""
    own = job.host.streams(set(job.changes))
    known = {site: Stream(Source(module)) for site, module in own.items()}
    components = {site.partition(".")[0] for site in known}
    return {
        s: of for s, of in job.found_streams.items() if s.partition(".")[0] not in components
    } | known


def notes_on(streams: Mapping[str, Stream], changed: Iterable[str]) -> list[str]:
    """For each component with ``changed`` sites, at how many layers drift is repaired, by name."""
    notes: list[str] = []
    for component in sorted({site.partition(".")[0] for site in changed}):
        own = [stream for site, stream in streams.items() if site.startswith(f"{component}.")]
        gated = sum(stream.gate is not None for stream in own)
        where = f"at {len(own)} layers" + (f", {gated} of them behind gates" if gated else "")
        none = "nowhere, since no layer was recognised as adding to a residual stream"
        notes.append(f"{component}: repaired {where if own else none}")
    return notes


def without_idle(solutions: Mapping[str, Solution], repairs: Repairs) -> dict[str, Solution]:
    """``solutions`` without repairs of zero, such as those before the first site of a LoRA, where
    nothing has drifted yet."""
    return {s: one for s, one in solutions.items() if s not in repairs or one.change.squared_norm()}


def at_all_inputs(change: LowRank, inputs: Tensor, width: int) -> LowRank:
    """Expand a change on the chosen ``inputs`` to all ``width`` inputs."""
    down = change.down.new_zeros(change.rank, width)
    down[:, inputs.to(down.device)] = change.down
    return LowRank(change.up, down)


def sizes_of(changes: Mapping[str, SiteChanges]) -> dict[str, float]:
    """(Σ ‖ΔW_i‖²)^½ of every site; of a repair site, which no LoRA changes, the root mean square
    over the others of its component."""
    squares = {
        site: sum(change.squared_norm() for change in at_site.own.values())
        for site, at_site in changes.items()
    }
    of_component: dict[str, list[float]] = {}
    for site, square in squares.items():
        if square:
            of_component.setdefault(site.partition(".")[0], []).append(square)
    typical = {component: fmean(some) for component, some in of_component.items()}
    return {
        site: math.sqrt(square or typical.get(site.partition(".")[0], 0.0))
        for site, square in squares.items()
    }


def _evenly(out: int, width: int, share: float, most: int) -> Tensor | None:
    """The inputs that a site may use, evenly spaced, ``most`` at most; None: all."""
    count = min(max(1, round(width * share)), most)
    if width <= out or count == width:
        return None
    return torch.arange(count) * width // count


def _largest_ranks(changes: Mapping[str, SiteChanges]) -> dict[str, list[int]]:
    """Component → the largest rank of every concept there, 0 if it changes nothing."""
    ranks: dict[str, list[int]] = {}
    for site, some in changes.items():
        largest = ranks.setdefault(site.partition(".")[0], [0] * len(some.by_concept))
        for concept, change in some.own.items():
            largest[concept] = max(largest[concept], change.rank)
    return ranks


_NO_RANKS: Mapping[str, int] = {}


@dataclass(frozen=True)
class Solvers:
    """Solves the sites of a ``job``'s stages. ``acting`` are the sites that show where in an image
    a LoRA acts."""

    job: Job
    settings: IterisSettings
    acting: Set[str]
    repairs: Repairs

    def of(
        self, stage: Stage, *, ranks: Mapping[str, int] = _NO_RANKS, residuals: bool = False
    ) -> StageSolver:
        """A stage's solver. ``ranks`` holds each site's rank (none: the settings'). With
        ``residuals``, repairs report their residual too; only the search for ranks reads it."""
        job, settings, repairs = self.job, self.settings, self.repairs
        dtype: torch.dtype = getattr(torch, settings.precision)
        ridge, pull = settings.ridge, settings.pull
        if ridge is None:
            ran = stage.samples or job.calibration.samples, job.calibration.rows_each, job.loras
            ridge = job.thresholds.ridge_for(*ran)
            pull = pull or job.thresholds.pull_for(*ran)
        pictures, weighting = job.host.pictures, settings.weighting
        if weighting == "auto":
            weighting = "tokens" if pictures else "none"
        shrink, few = settings.shrink, math.inf
        if shrink is None:
            shrink, few = job.thresholds.shrink_for(pictures), job.thresholds.few_tokens
        fit = RegressionSpec(
            job.weights,
            ridge,
            weighting,
            shrink=shrink,
            shrinks_below=few,
            rank=settings.rank,
            pull=pull or "mean",
        )
        repairing = replace(fit, dtype=dtype, residuals=residuals)  # many inputs wide
        inputs = {site: chosen for site, chosen in repairs.items() if chosen is not None}

        bounds = _bounds(job, settings)

        def fit_of(site: str) -> RegressionSpec:
            of = repairing if site in repairs else fit
            if site in bounds:
                of = replace(of, bound=bounds[site])
            return replace(of, rank=ranks[site]) if ranks else of

        def solve(site: str, reduction: Reduction) -> Solution:
            solution = reduction.solve(fit_of(site))
            if site not in inputs:
                return solution
            width = job.changes[site].shape[1]
            return replace(solution, change=at_all_inputs(solution.change, inputs[site], width))

        def used(site: str) -> SiteChanges:
            changes = job.changes[site]
            return changes.at(inputs[site]) if site in inputs else changes

        return StageSolver(
            begin=lambda context: job.thresholds.choose(context, fit, settings.objective, dtype),
            solve=solve,
            bytes=lambda site, sweep: job.thresholds.bytes(
                used(site), fit_of(site), settings.objective, dtype.itemsize, sweep=sweep
            ),
            dtype=dtype,
            acting=self.acting,
            inputs=inputs,
        )


def _bounds(job: Job, settings: IterisSettings) -> dict[str, float]:
    """Site → the largest norm of its change. Unless the settings say it, there is none in a
    component with gates, except at layers whose output is added without one."""
    sizes = sizes_of(job.changes)
    if settings.bound is not None:
        return {s: settings.bound * size for s, size in sizes.items()} if settings.bound else {}
    streams = streams_of(job)
    free = {site for site, stream in streams.items() if stream.gate is not None}
    gated = {site.partition(".")[0] for site in free}
    plain = streams.keys() - free
    return {
        site: job.thresholds.bound * size
        for site, size in sizes.items()
        if site in plain or site.partition(".")[0] not in gated
    }
