"""RegMean and RegMean++: least squares on each LoRA's own inputs, or on the merged model's.

RegMean (Jin et al., ICLR 2023, arXiv 2212.09849) is the paper's eq. 4, ΔW = (Σ ΔW_i G_i)(Σ G_i)⁻¹
with G_i = X_iᵀX_i, its off-diagonal entries shrunk. RegMean++ (2025, arXiv 2508.03121) takes G_i
from the inputs that reach the site through the layers merged already. Both are exactly low rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..activations.collect import Collector, SiteMoments
from ..lora import LowRank
from ..passes.batches import Batching
from ..passes.job import Job
from ..passes.loops import reference_pass, sweep_pass
from ..settings import Settings, setting
from ..solve.moments import InputMoments, SharedInputs
from ..solve.site import Solution, solve_site
from .iteris import check_complete, site_report
from .registry import ROWS_PER_FORWARD, SUM_OF_RANKS, Merged, method


@dataclass(frozen=True)
class RegMeanSettings(Settings):
    shrink: float = setting(
        0.9,
        "What off-diagonal entries of the moments are multiplied by; 0.9 in the paper, 1 is eq. 4 "
        "of IterIS.",
        low=0,
        high=1,
    )
    rank: int | float | None = setting(
        None, "Rank of the result.", none=SUM_OF_RANKS, share="energy", low=1
    )
    micro_batch: int = setting(32, ROWS_PER_FORWARD, low=1)


@method("regmean", RegMeanSettings, needs_host=True)
def regmean(job: Job, settings: RegMeanSettings) -> Merged:
    """Least squares on each LoRA's own inputs (RegMean, ICLR 2023; paper, eq. 4)."""
    collector = Collector(job.references, full=False, shards=job.shards)
    reference_pass(job, collector, Batching(settings.micro_batch, cross=True))
    solved = {site: _solve(job, site, collector.take(site), settings) for site in collector.sites}
    check_complete(job, solved)
    return {site: (s.change, site_report(s)) for site, s in solved.items()}


@method("regmean++", RegMeanSettings, needs_host=True)
def regmean_plus_plus(job: Job, settings: RegMeanSettings) -> Merged:
    """RegMean on the inputs that passed the layers merged already (RegMean++, 2025)."""
    solved: dict[str, Solution] = {}

    def visitor_and_solve() -> tuple[Collector, Callable[[str], LowRank]]:
        collector = Collector(job.references, full=False, shards=job.shards)

        def solve(site: str) -> LowRank:
            solved[site] = _solve(job, site, collector.take(site), settings)
            return solved[site].change

        return collector, solve

    sweep_pass(job, visitor_and_solve, Batching(settings.micro_batch, cross=True))
    check_complete(job, solved)
    return {site: (s.change, site_report(s)) for site, s in solved.items()}


def _solve(job: Job, site: str, moments: SiteMoments, settings: RegMeanSettings) -> Solution:
    """The adapter objective with X = X̃: both moments are G_i."""
    inputs = [InputMoments(part.own, part.own, part.tokens) for part in moments.shared.concepts]
    return solve_site(
        job.references[site],
        SharedInputs(inputs),
        moments.targets,
        job.weights,
        align="adapter",
        balance="none",
        ridge=0.0,
        shrink=settings.shrink,
        rank=settings.rank,
    )
