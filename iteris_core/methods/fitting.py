"""The settings of ``iteris``, which sites it adds to remove drift, and how it fits each site.

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
from typing import Literal

import torch
from torch import Tensor

from ..activations.site import site_of
from ..activations.streams import Source, Stream
from ..errors import SettingsError
from ..hosts.protocol import Stage
from ..lora import LowRank, SiteChanges
from ..passes.job import Job
from ..settings import Settings, setting
from ..solve.moments import OutputMoments
from ..solve.problem import (
    MemoryEstimate,
    Reduction,
    RegressionSpec,
    SiteContext,
    Solution,
    StageSolver,
)
from ..solve.ranks import Components
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
    bound: float | None = setting(
        None,
        "Largest norm of a layer's change, as a multiple of the norm of the layer's own weight, "
        "but no less than what the LoRAs together have there. A layer's ridge is raised until it "
        "holds, so that the merge also works at other strengths and beside other LoRAs. 0: no "
        "bound.",
        none="0.8 times the root of the number of LoRAs, and at most 6 times what they have there; "
        "less with few prompts",
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
    steps: int | None = setting(
        None,
        "Steps of gradient descent (Muon) through the whole denoiser after the closed form, on the "
        "rows that were collected. They keep more of each LoRA, at every strength. A step takes "
        "about as long as 64 forwards of one row.",
        none="20, and 20 for each LoRA, up to 100; 0 for a single LoRA and for models of texts",
        low=0,
        most=10_000,
    )

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


def solver_of(
    job: Job,
    acting: Set[str],
    repairs: Repairs,
    settings: IterisSettings,
    stage: Stage,
    *,
    ranks: Mapping[str, int] | None = None,
    found: dict[str, Components] | None = None,
) -> StageSolver:
    """Solves the sites of a ``stage`` of the ``job``. ``acting`` are the sites that show where in
    an image a LoRA acts. ``ranks`` holds each site's rank (none: the settings'). The components of
    every site are added to ``found``, to share ranks out."""
    dtype: torch.dtype = getattr(torch, settings.precision)
    thresholds, pictures, weighting = job.thresholds, job.host.pictures, settings.weighting
    samples, timesteps = stage.samples or job.calibration.samples, job.calibration.rows_each
    ridge, pull = settings.ridge, "mean"
    if ridge is None:
        ridge, pull = thresholds.ridge_for(samples, timesteps, job.loras)
    if weighting == "auto":
        weighting = "tokens" if pictures else "none"
    shrink, few = settings.shrink, math.inf
    if shrink is None:
        shrink, few = 1.0 if pictures else thresholds.shrink, thresholds.few_tokens
    fit = RegressionSpec(
        job.weights,
        ridge,
        weighting,
        shrink=shrink,
        shrinks_below=few,
        rank=settings.rank,
        pull=pull,
    )
    repairing = replace(fit, dtype=dtype, residuals=found is not None)  # many inputs wide
    inputs = {site: chosen for site, chosen in repairs.items() if chosen is not None}
    bounds = bounds_of(job, settings.bound, stage)

    def fit_of(site: str) -> RegressionSpec:
        of = repairing if site in repairs else fit
        of = replace(of, bound=bounds[site])
        return replace(of, rank=ranks[site]) if ranks else of

    def begin(context: SiteContext) -> Reduction:
        reduction = thresholds.choose(context, fit, settings.objective)
        if found is not None and isinstance(reduction, OutputMoments):
            reduction.weigher.weightings.add("full")  # for the energies of whole outputs
        return reduction

    def solve(site: str, reduction: Reduction) -> Solution:
        if ranks is not None and not ranks[site]:  # a repair for which the file has no room
            return Solution(job.changes[site].like.scaled(0))
        solution = reduction.solve(fit_of(site))
        if site in inputs:
            own = solution.change
            down = own.down.new_zeros(own.rank, job.changes[site].shape[1])
            down[:, inputs[site].to(down.device)] = own.down
            solution = replace(solution, change=LowRank(own.up, down))
        if found is not None and isinstance(reduction, OutputMoments):
            found[site] = _components(reduction, solution)
        return solution

    def size(site: str, sweep: bool) -> MemoryEstimate:
        changes, objective = job.changes[site], settings.objective
        changes = changes.at(inputs[site]) if site in inputs else changes
        return thresholds.bytes(changes, fit_of(site), objective, dtype.itemsize, sweep=sweep)

    return StageSolver(begin, solve, size, dtype, acting, inputs)


def _components(reduction: OutputMoments, solution: Solution) -> Components:
    """The components of a ``solution`` without a cut, and their worths."""
    assert solution.errors is not None
    explained = 1 - solution.errors[1].cpu().clamp(max=1).square()
    weights = torch.tensor(solution.weighting, dtype=torch.float64)
    given = float((weights * reduction.energies.double().cpu() * explained).sum())
    whole = float((weights * reduction.weigher.outputs.double().cpu()).sum())
    total = math.sqrt(given / max(whole, 1e-30))
    # Both factors' norms contain the roots of the singular values at the output, up to one common
    # factor.
    shares = solution.change.up.double().norm(dim=0) ** 4
    shares = (shares / shares.sum().clamp(min=1e-30)).cpu()
    lost = torch.cat([shares.new_ones(1), 1 - shares.cumsum(0)])
    return Components(solution.change, total * (lost[:-1].square() - lost[1:].square()), total)
