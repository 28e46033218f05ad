"""IterIS in the row space of all LoRAs together, see :mod:`..solve.subspace`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..passes.job import Job
from ..passes.loops import Reducing
from ..settings import Settings, setting
from ..solve.problem import Fit
from ..solve.subspace import Subspace
from .registry import micro_batch_setting, on_activations


@dataclass(frozen=True)
class IterisSubspaceSettings(Settings):
    ridge: float = setting(
        1e-5, "How strongly a layer is drawn toward the mean of the LoRAs.", low=0, below=1
    )
    weighting: Literal["tokens", "none"] = setting(
        "tokens",
        "What evens out the concepts: the number of tokens, or nothing.",
        former=("balance",),
    )
    micro_batch: int = micro_batch_setting()


@on_activations("iteris-subspace", IterisSubspaceSettings, merged_inputs=True)
def iteris_subspace(job: Job, settings: IterisSubspaceSettings) -> Reducing:
    """IterIS in the row space of all LoRAs together: the smallest statistics."""
    fit = Fit(job.weights, settings.ridge, settings.weighting)
    return Reducing(
        begin=Subspace.begin,
        solve=lambda _, reduction: reduction.solve(fit),
        bytes=lambda site, _: Subspace.bytes(job.changes[site]),
    )
