"""What the methods that work on whole ΔW matrices share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..linalg.lowrank import cut_factors, cut_matrix
from ..lora import LowRank, Rank
from ..passes.job import Job
from ..report.report import SiteReport
from .registry import Merged


def merge_dense(job: Job, rank: Rank | None, merge: Callable[[Sequence[Tensor]], Tensor]) -> Merged:
    """Apply ``merge`` to the dense changes of each site, (out, in), float64, and cut by SVD.

    The result of ``merge`` is of full rank in general; ``rank=None`` keeps Σ r_i, and the report
    has the share of energy that is lost.
    """
    merged: dict[str, tuple[LowRank, SiteReport]] = {}
    for site, changes in job.references.items():
        present = [change for change in changes if change is not None]
        dense = merge(
            [
                change.up.double() @ change.down.double() * weight
                for change, weight in zip(changes, job.weights, strict=True)
                if change is not None
            ]
        )
        limit = rank if isinstance(rank, int) else sum(change.rank for change in present)
        limit = min(limit, *dense.shape)
        change, lost = cut_matrix(dense, limit, like=present[0])
        if isinstance(rank, float):
            change, more = cut_factors(change, rank)
            lost = 1 - (1 - lost) * (1 - more)
        merged[site] = change, SiteReport(change.rank, truncated=lost)
        job.tick("merging sites", len(merged), len(job.references))
    return merged
