"""IterIS (CVPR 2025, arXiv 2411.15231): least squares on the inputs of the merged model.

There are two schedules. ``jacobi`` is the paper's Algorithm 1: solve every site from the features
of the last merged model, repeatedly. ``sweep`` solves every site once, in execution order, on
inputs that already passed through the solved sites. A site's inputs depend only on earlier sites,
so one sweep gives the same result as the iteration, if that converges.

With shared ranks, a layer counts by √(E / Y): E is the energy of the change's outputs, Σ λ_i ‖X̃_i
ΔWᵀ‖², and Y that of the layer's whole outputs under the LoRAs. A merge of many LoRAs has many
components of similar energy. If s is the share of E not yet covered, a component is worth its
reduction of s². The first components of every layer therefore come before the last ones of any.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, cast

import torch

from ..errors import SettingsError
from ..hosts.protocol import Stage
from ..lora import LowRank
from ..passes.batches import SWEEP, ExecutionConfig, Schedule
from ..passes.held_out import expect_held_out
from ..passes.job import Job, Merged
from ..passes.sweep import Passes
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
from ..solve.ranks import Components, share_numbers
from .distillation import Distillation
from .fitting import Repairs, bounds_of, streams_of, with_repairs
from .registry import Fit, micro_batch_setting, on_model, rank_setting


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
    steps: int = setting(
        0,
        "Adam steps through the whole denoiser after the closed form, on the rows that were "
        "collected. 200 are worth their time: more of each LoRA is kept, at every strength. A step "
        "takes about as long as 80 forwards of one row.",
        low=0,
        most=10_000,
    )
    removed: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("block_steps", "polish_steps"), "steps"),
        **dict.fromkeys(("block_rate", "polish_rate", "block_pairs"), ""),
        **dict.fromkeys(("pull", "repair_inputs", "tolerance"), ""),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.share_ranks:
            return
        if not isinstance(self.rank, int):
            raise SettingsError("share_ranks needs a whole number as rank, such as rank=16.")
        if self.schedule != "sweep" or self.objective != "output":
            raise SettingsError("share_ranks needs schedule=sweep and objective=output.")


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
    explained = torch.tensor([1 - min(after, 1.0) ** 2 for after in solution.after])
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


@on_model(
    "iteris",
    IterisSettings,
    sweeps=lambda given: 0 if given.schedule == "jacobi" else 1 + given.share_ranks,
    sums=True,
)
def iteris(job: Job, settings: IterisSettings) -> Generator[Fit]:
    """Least squares on the inputs of the merged model (IterIS, CVPR 2025)."""
    repairs: Repairs = {}
    if settings.repair and settings.objective == "output":
        job, repairs = with_repairs(job)
    schedule = SWEEP
    if settings.schedule == "jacobi":
        schedule = Schedule(False, settings.iterations)
    saliency = settings.saliency
    if saliency is None:  # two concepts hardly compete
        saliency = max(0.0, 1 - 2 / job.loras)
    changed = job.changes.keys() - repairs.keys()
    acting = changed & streams_of(job).keys() if saliency else set[str]()
    tokens = None if settings.row_tokens == "all" else settings.row_tokens or "enough"
    seed, thresholds = job.calibration.seed, job.thresholds
    batching = ExecutionConfig(settings.micro_batch, tokens, seed, saliency, thresholds)
    solver_for = partial(solver_of, job, acting, repairs)
    solver = partial(solver_for, settings)
    with job.run() as run:
        distillation = Distillation(run, settings.steps) if settings.steps else None
        passes = Passes(run, solver, batching, schedule, 1 + settings.share_ranks)
        if distillation is not None:
            passes.also = distillation.plan
            expect_held_out(job, versions=2)

        def merge() -> Merged:
            if settings.share_ranks:
                components: dict[str, Components] = {}
                uncut = replace(settings, rank=None, share_ranks=False)
                passes.solver_of = partial(solver_for, uncut, found=components)
                passes.solve()
                rank = cast(int, settings.rank)
                own = [job.changes[site] for site in changed]
                numbers = sum(min(rank, changes.rank) * sum(changes.shape) for changes in own)
                passes.solver_of = partial(
                    solver, ranks=share_numbers(components, numbers, changed)
                )
            merged = passes.solve()
            # Repairs of zero are those where nothing has drifted yet.
            sites = {
                site: solution
                for site, solution in merged.sites.items()
                if site not in repairs or solution.change.squared_norm()
            }
            merged = replace(merged, sites=sites, repairs=repairs.keys())
            return merged if distillation is None else distillation.trained(merged, settings.bound)

        yield Fit(merge, passes)
