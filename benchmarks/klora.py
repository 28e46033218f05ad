"""K-LoRA (Ouyang et al., CVPR 2025, arXiv 2502.18461): two LoRAs without a merged file.

At every step of denoising each layer has one of the two: the first where

    Σ of the k largest |ΔW_1| / γ  >  s(t) · Σ of the k largest |ΔW_2|,   k = r_1 r_2,

γ the mean over layers of Σ|ΔW_1| / Σ|ΔW_2|, less layers three times above it, and s(t) = α t + β
with t from 0 at the first step to 1. The variant s* takes s modulo α. As the authors' code has it,
but that t is the same at all layers of a step. Layers outside of the denoiser, which their LoRAs do
not change, have both.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import nn

from iteris_core import Lora, LowRank

_OUTLIER = 3.0


@dataclass(frozen=True)
class Scale:
    """s(t); by default the authors' s, for what has to keep its texture."""

    alpha: float = 1.5
    beta: float = 0.5
    wraps: bool = False

    @staticmethod
    def star() -> Scale:
        """The authors' s*, for more of the second LoRA early on."""
        return Scale(1.5, 0.85 * 1.5, wraps=True)

    def at(self, progress: float) -> float:
        scale = self.alpha * progress + self.beta
        return scale % self.alpha if self.wraps else scale


class KLora:
    """Which of two LoRAs every layer has, by the progress of denoising."""

    def __init__(self, first: Lora, second: Lora, scale: Scale | None = None) -> None:
        self.first, self.second, self.scale = first, second, scale or Scale()
        both = [site for site in first.sites if site in second.sites]
        self._sums = {site: _largest(first.sites[site], second.sites[site]) for site in both}
        self.ratio = _ratio([(first.sites[site], second.sites[site]) for site in both])

    def chosen(self, progress: float) -> dict[str, LowRank]:
        """site → its change at ``progress``, from 0 to 1."""
        scale = self.scale.at(progress)
        changes = {**self.second.sites, **self.first.sites}
        for site, (one, two) in self._sums.items():
            if one / self.ratio <= scale * two:
                changes[site] = self.second.sites[site]
        return changes


@contextmanager
def k_lora(
    klora: KLora, sites: Mapping[str, nn.Module], denoiser: nn.Module, steps: int
) -> Generator[None]:
    """Every call of ``denoiser`` with the layers' chosen changes on their weights; ``steps`` calls
    are one denoising. All weights are put back bit for bit."""
    inside = {id(module) for module in denoiser.modules()}
    named = {**klora.first.sites, **klora.second.sites}
    kept = {site: sites[site].weight.data.clone() for site in named}
    on: dict[str, LowRank] = {}
    calls = 0

    def put(site: str, *changes: LowRank) -> None:
        weight = sites[site].weight.data
        weight.copy_(kept[site])
        for change in changes:
            weight += change.dense().reshape(weight.shape).to(weight)

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal calls
        for site, change in klora.chosen(calls % steps / steps).items():
            if id(sites[site]) in inside and on.get(site) is not change:
                put(site, change)
                on[site] = change
        calls += 1

    handle = denoiser.register_forward_pre_hook(before)
    try:
        for site in named:
            if id(sites[site]) not in inside:
                loras = (klora.first, klora.second)
                put(site, *(lora.sites[site] for lora in loras if site in lora.sites))
        yield
    finally:
        handle.remove()
        for site, weight in kept.items():
            sites[site].weight.data.copy_(weight)


def _largest(one: LowRank, two: LowRank) -> tuple[float, float]:
    """The sums of the r_1 r_2 largest entries of each."""
    count = min(one.rank * two.rank, one.shape[0] * one.shape[1])
    first, second = (c.dense().abs().flatten().topk(count).values.sum() for c in (one, two))
    return float(first), float(second)


def _ratio(pairs: list[tuple[LowRank, LowRank]]) -> float:
    ratios = [float(one.dense().abs().sum() / two.dense().abs().sum()) for one, two in pairs]
    if not ratios:
        return 1.0
    mean = fmean(ratios)
    return fmean([ratio for ratio in ratios if ratio < _OUTLIER * mean])
