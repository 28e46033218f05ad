"""IterIS in the row space of all LoRAs together, see :mod:`.subspace`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from iteris_core.methods.registry import micro_batch_setting, on_activations
from iteris_core.passes.job import Job
from iteris_core.settings import Settings, setting
from iteris_core.solve.problem import RegressionSpec

from .subspace import Subspace


@dataclass(frozen=True)
class IterisSubspaceSettings(Settings):
    ridge: float = setting(
        1e-5, "How strongly a layer is drawn toward the mean of the LoRAs.", low=0, below=1
    )
    weighting: Literal["tokens", "none"] = setting(
        "tokens", "What evens out the concepts: the number of tokens, or nothing."
    )
    micro_batch: int = micro_batch_setting()


@on_activations("iteris-subspace", IterisSubspaceSettings, Subspace, merged_inputs=True, sums=False)
def iteris_subspace(job: Job, settings: IterisSubspaceSettings) -> RegressionSpec:
    """IterIS in the row space of all LoRAs together: the smallest statistics."""
    return RegressionSpec(job.weights, settings.ridge, settings.weighting)
