"""Rank-1 spikes that LoRAs share: a merge counts them once."""

import pytest
import torch
from oracle import SITES, ModuleHost, Net, changed, make_data, make_lora

from iteris_core import Concept, Lora, LowRank, merge_loras
from iteris_core.lora import concatenate

GATE = "up"


def planted(seed: int, height: float = 3.0, apart: float = 0.1) -> Lora:
    """A small LoRA with a spike of ``height`` at one site, which is nearly every other one's."""
    lora = make_lora(seed, size=0.2)
    change = lora.sites[GATE]
    common, own = (torch.Generator().manual_seed(number) for number in (50, seed + 100))
    left, right = (
        torch.randn(side, generator=common, dtype=torch.float64)
        + apart * torch.randn(side, generator=own, dtype=torch.float64)
        for side in change.shape
    )
    left, right = left / left.norm(), right / right.norm()
    spike = LowRank(height * left[:, None], right[None], change.kernel)
    return Lora({**lora.sites, GATE: concatenate([change, spike])}, lora.name)


def drift(lora: Lora, own: Lora, data: torch.Tensor) -> float:
    """How far the model's outputs are from those of ``own`` alone, as a share of its effect."""

    def outputs(some: Lora) -> torch.Tensor:
        with torch.no_grad():
            return changed(Net(), {site: some.sites[site].dense() for site in SITES})(data)

    wanted = outputs(own)
    with torch.no_grad():
        plain = Net()(data)
    return float((outputs(lora) - wanted).norm() / (wanted - plain).norm())


def merged(net: Net, loras, data, method="iteris", **settings) -> Lora:
    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    if method == "iteris":
        settings = {"precision": "float64", **settings}
    return merge_loras(ModuleHost(net, data), concepts, method, settings=settings).lora


@pytest.mark.parametrize("schedule", [{}, {"schedule": "jacobi", "iterations": 12}])
def test_a_shared_spike_counts_once(schedule):
    """As if the base had it, and the LoRAs had not."""
    rest, data = [make_lora(1, size=0.2), make_lora(2, size=0.2)], make_data(2)
    spiked = [planted(1, apart=0.0), planted(2, apart=0.0)]
    spike = spiked[0].sites[GATE].dense() - rest[0].sites[GATE].dense()
    base = changed(Net(), {GATE: spike})
    wide = {"rank": 1000, **schedule}
    ours = merged(Net(), spiked, data, **wide).sites
    theirs = merged(base, rest, data, **wide).sites
    wanted = {site: change.dense() for site, change in theirs.items()}
    wanted[GATE] = wanted[GATE] + spike
    for site, dense in wanted.items():
        assert float((ours[site].dense() - dense).norm() / dense.norm()) < 1e-6, site


@pytest.mark.parametrize("apart", [0.0, 0.1])
def test_two_spiked_loras_do_not_add_up(apart):
    loras, data = [planted(n, 30.0, apart) for n in (1, 2)], make_data(2)
    ours, added = merged(Net(), loras, data), merged(Net(), loras, data, "sum")
    for own, of_one in zip(loras, data, strict=True):
        assert drift(added, own, of_one) > 1
        assert drift(ours, own, of_one) < 0.5 * drift(added, own, of_one)
