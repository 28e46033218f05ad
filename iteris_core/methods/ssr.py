"""SSR-Merge (Wei et al., ICML 2026, arXiv 2606.10617): route signals between the LoRAs' subspaces.

The regression is :mod:`..solve.router`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..passes.job import Job
from ..settings import Settings, setting
from ..solve.problem import RegressionSpec
from ..solve.router import Router
from .registry import micro_batch_setting, on_activations


@dataclass(frozen=True)
class SsrSettings(Settings):
    ridge: float = setting(1e-4, "λ, absolute as in the source.", low=0)
    micro_batch: int = micro_batch_setting()


@on_activations("ssr", SsrSettings, Router, merged_inputs=False, sums=False)
def ssr(job: Job, settings: SsrSettings) -> RegressionSpec:
    """Least squares in the row space of all LoRAs together (SSR-Merge, ICML 2026)."""
    return RegressionSpec(job.weights, settings.ridge, "none")
