"""Our factored solve against a transcription of the official dense one, on the same moments.

``python benchmarks/speed/solve.py`` prints JSON: for the site shapes of SD 1.5, SDXL and
FLUX at rank 32 and N = 2, 4, 8 LoRAs the median time of each, their ratio, the ratio of the peak
memory of live tensors, and the relative difference of the results.

The dense form is the paper's Algorithm 1 as its authors wrote it for whole weights, here on ΔW:
G_i = X_iᵀX̃_i + ridge, M = Σ λ_i (X̃_iᵀX̃_i + ridge), ΔW = (Σ λ_i ΔW_i G_i) M⁻¹ by a general solve
with out right-hand sides, all in float64.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iteris_core.activations.meter import MemoryMeter
from iteris_core.lora import LowRank, SiteChanges
from iteris_core.solve.adapter import AdapterMoments
from iteris_core.solve.inputs import CrossMoments
from iteris_core.solve.problem import RegressionSpec, SiteContext

RANK = 32
SHAPES = {
    "SD 1.5 attention 320": (320, 320),
    "SD 1.5 attention 1280": (1280, 1280),
    "SD 1.5 cross-attention": (1280, 768),
    "SD 1.5 feed-forward": (1280, 5120),
    "SDXL cross-attention": (1280, 2048),
    "FLUX attention": (3072, 3072),
}
LARGE = ("SD 1.5 feed-forward", "FLUX attention")


@dataclass
class Rows:
    """One concept's tokens, (tokens, in): X̃ and X."""

    concept: int
    merged: Tensor
    reference: Tensor


def make_problem(out: int, width: int, count: int) -> AdapterMoments:
    """A site's moments, of ``count`` LoRAs."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, width)
    changes: list[LowRank] = []
    rows: list[Rows] = []
    for concept in range(count):
        up = torch.randn(out, RANK, generator=generator)
        down = torch.randn(RANK, width, generator=generator) / width**0.5
        changes.append(LowRank(up, down))
        x = torch.randn(2 * width, width, generator=generator) * scale
        xt = x + 0.1 * torch.randn(2 * width, width, generator=generator) * scale
        rows.append(Rows(concept, xt, x))
    moments = CrossMoments(count, width, torch.float32, torch.device("cpu"))
    opening = SiteContext(
        SiteChanges(tuple(changes)), torch.device("cpu"), lambda _: (moments, True)
    )
    reduction = AdapterMoments(opening, "none", torch.float32)
    for part in rows:
        reduction.add(part)
    moments.complete()
    return reduction


def ours(site: AdapterMoments, *, residuals: bool = False) -> LowRank:
    """Without the report's residuals, which the dense solve does not make either."""
    site.inputs.forget_factor()
    weights = [1.0] * len(site.changes)
    return site.solve(RegressionSpec(weights, 1e-5, "none", residuals=residuals)).change


def dense(site: AdapterMoments) -> Tensor:
    out, width = site.changes.shape
    left = torch.zeros(width, width, dtype=torch.float64)
    right = torch.zeros(width, out, dtype=torch.float64)
    eye = torch.eye(width, dtype=torch.float64)
    moments = zip(site.inputs.own, site.inputs.cross, strict=True)
    for change, (own, cross) in zip(site.changes.present.values(), moments, strict=True):
        own, cross = own.double(), cross.double()
        whole = change.up.double() @ change.down.double()
        left += own + 1e-5 * own.norm() * eye
        right += (cross + 1e-5 * cross.norm() * eye).mT @ whole.mT
    return torch.linalg.solve(left, right).mT


def reported(site: AdapterMoments) -> LowRank:
    return ours(site, residuals=True)


def measure(function: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, MiB of live tensors at most) of one call."""
    started = time.perf_counter()
    function()
    seconds = time.perf_counter() - started
    with MemoryMeter() as meter:
        function()
    return seconds, meter.peak / 2**20


def compare(rounds: int, *, quick: bool) -> dict[str, Any]:
    """shape and N → medians, ratios (dense over ours) and the relative difference."""
    found: dict[str, Any] = {}
    for name, (out, width) in SHAPES.items():
        if quick and name in LARGE:
            continue
        for count in (2, 4, 8):
            problem = make_problem(out, width, count)
            contenders = {"ours": ours, "ours with residuals": reported, "dense": dense}
            times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in contenders}
            for _ in range(rounds):
                for kind, solve in contenders.items():
                    times[kind].append(measure(lambda s=solve, p=problem: s(p)))
            wanted = dense(problem)
            found_change = ours(problem).to(torch.float64).dense()
            gap = float((found_change - wanted).norm() / wanted.norm())
            medians = {
                kind: [statistics.median(column) for column in zip(*some, strict=True)]
                for kind, some in times.items()
            }
            found[f"{name}, N = {count}"] = {
                "ours_seconds": medians["ours"][0],
                "ours_with_residuals_seconds": medians["ours with residuals"][0],
                "dense_seconds": medians["dense"][0],
                "time_ratio": medians["dense"][0] / medians["ours"][0],
                "memory_ratio": medians["dense"][1] / medians["ours"][1],
                "difference": gap,
            }
    return found


if __name__ == "__main__":
    print(json.dumps(compare(5, quick=False), indent=1))
