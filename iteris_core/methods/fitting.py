"""The settings of ``iteris``, how it fits each site, and which sites it adds to remove drift.

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
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..activations.site import site_of
from ..activations.streams import Source, Stream
from ..errors import SettingsError
from ..hosts.protocol import Stage
from ..lora import LowRank, SiteChanges
from ..passes.job import Job
from ..settings import Settings, setting
from ..solve.problem import Reduction, RegressionSpec, Solution, StageSolver
from .registry import micro_batch_setting, rank_setting


@dataclass(frozen=True)
class IterisSettings(Settings):
    objective: Literal["output", "adapter"] = setting(
        "output",
        "Targets of a layer: its whole output under each LoRA, or only what each LoRA adds to it "
        "(adapter: the paper's eq. 5).",
    )
    schedule: Literal["sweep", "jacobi"] = setting(
        "sweep",
        "sweep solves every layer once, in order. jacobi is the paper's iteration over all "
        "layers, with many passes. With repair or saliency it may not converge; the report says "
        "so. For the paper's whole algorithm use the preset paper.",
    )
    iterations: int = setting(10, "jacobi: maximum number of iterations.", low=1, most=100)
    tolerance: float | None = setting(
        None,
        "jacobi: stop when every layer's change moves by less than this share of itself, such as "
        "0.001.",
        none="run all iterations",
        above=0,
        below=1,
    )
    weighting: Literal["auto", "tokens", "adapter", "full", "none"] = setting(
        "auto",
        "How to balance the concepts: by the number of tokens, the size of each LoRA's own "
        "outputs (adapter: the paper's eq. 8), the layer's whole output, or not at all. auto is "
        "tokens, and none for models of texts.",
    )
    ridge: float | None = setting(
        None,
        "How strongly a layer is pulled toward the plain LoRAs (the paper's eq. 7). Above 0.001 "
        "most of the merge is lost.",
        none="set by the number of prompts: 1e-6 from 50 per LoRA with two LoRAs, 20 with five or "
        "10 with ten; more with fewer",
        low=0,
        below=1,
        most=0.5,
        step=1e-7,
    )
    pull: Literal["mean", "size"] | None = setting(
        None,
        "What the ridge pulls a layer toward: the weighted mean of the LoRAs, as in the paper, or "
        "that mean scaled to the LoRAs' size (size), because a mean of unlike changes is small.",
        none="mean; size, if prompts are few and the automatic ridge is larger",
    )
    bound: float | None = setting(
        None,
        "Largest norm of a layer's change, as a multiple of what the LoRAs together have there. A "
        "layer's ridge is raised until it holds, so that the merge also works at other strengths "
        "and beside other LoRAs. 0: no bound.",
        none="4; none in a model whose blocks gate what they add, but where a layer's output is "
        "not gated",
        low=0,
        most=1000,
    )
    shrink: float | None = setting(
        None,
        "Factor on off-diagonal entries of the moments. Less than 1 is for a concept that has "
        "hardly more tokens than a layer has inputs.",
        none="1; less for models of texts, in layers where tokens are few",
        above=0,
        high=1,
    )
    rank: int | float | None = rank_setting(
        "Largest rank of the merged LoRA.", share="output energy", most=1024
    )
    share_ranks: bool = setting(
        False,
        "rank limits the file as a whole: it is as large as with that rank in every layer that a "
        "LoRA changes, and each layer gets the rank it is worth. The model is swept twice.",
    )
    micro_batch: int = micro_batch_setting()
    row_tokens: int | Literal["all"] | None = setting(
        None,
        "Maximum number of tokens used from each row, chosen at random by the seed.",
        none="for images 128, or as many as give a concept 32 per input of a layer; for texts all",
        low=1,
        most=100_000,
    )
    saliency: float | None = setting(
        None,
        "How much more the image regions count where a LoRA acts.",
        none="1 - 2 / LoRAs, because two hardly compete",
        low=0,
        high=1,
    )
    precision: Literal["float32", "float64"] = setting("float32", "dtype of the moments.")
    repair: bool = setting(
        True,
        "Also change layers that no LoRA changes, to remove interference between the concepts. "
        "The result is nearer to each LoRA alone; the file is larger.",
    )
    repair_inputs: float | None = setting(
        None,
        "Share of a feed-forward's hidden units that a repair may use.",
        none="half for two LoRAs on an image model, otherwise all",
        above=0,
        high=1,
    )
    block_steps: int = setting(
        0,
        "Adam steps on each block's output, block by block after the closed form. Uses gradients, "
        "but never through the whole model, and no data. The number is for two LoRAs and grows in "
        "proportion with more. 120 are worth their time for several concepts in one image, many "
        "concepts or a low rank.",
        low=0,
        most=1000,
    )
    block_rate: float = setting(
        0.05, "Learning rate of block_steps, relative to the size of the trained factors.", above=0
    )
    block_pairs: float = setting(
        0.5,
        "Share of block_steps on images of two concepts, from prompts that name both. Each half "
        "is trained toward its own LoRA's output.",
        low=0,
        below=1,
    )
    removed: ClassVar[Mapping[str, str]] = {"polish_steps": "block_steps", "polish_rate": ""}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.share_ranks:
            return
        if not isinstance(self.rank, int):
            raise SettingsError("share_ranks needs a whole number as rank, such as rank=16.")
        if self.schedule != "sweep" or self.objective != "output":
            raise SettingsError("share_ranks needs schedule=sweep and objective=output.")


Repairs = Mapping[str, Tensor | None]
"""Repair sites, and which of their inputs they may use (None: all)."""


def with_repairs(job: Job, share: float | None = None) -> tuple[Job, Repairs]:
    """``job`` with the host's streams and repair sites, and these sites. Repair sites with more
    inputs than outputs may use this ``share`` of their inputs (None: as the thresholds say). Each
    concept that changes a component gets a zero change there, at its largest rank in that
    component. A single concept leaves no drift."""
    if len(job.concepts) < 2:
        return job, {}
    if share is None:
        share = job.thresholds.repair_inputs_for(job.loras, job.host.pictures)
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


@dataclass(frozen=True)
class Solvers:
    """Solves the sites of a ``job``'s stages. ``acting`` are the sites that show where in an image
    a LoRA acts."""

    job: Job
    settings: IterisSettings
    acting: Set[str]
    repairs: Repairs

    def of(
        self, stage: Stage, *, ranks: Mapping[str, int] | None = None, residuals: bool = False
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
            shrink = 1.0 if pictures else job.thresholds.shrink
            few = job.thresholds.few_tokens
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
            own = solution.change
            down = own.down.new_zeros(own.rank, job.changes[site].shape[1])
            down[:, inputs[site].to(down.device)] = own.down
            return replace(solution, change=LowRank(own.up, down))

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
