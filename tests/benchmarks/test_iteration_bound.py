"""The bound of the paper's appendix A.3: how many iterations Algorithm 1 needs at most."""

from __future__ import annotations

import random
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from oracle import SITES, ModuleHost, Net, make_data, make_lora
from torch import nn

from iteris_core import Calibration, Concept, Lora, LowRank, merge_loras

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from iteration_bound import depths, iterations_bound  # noqa: E402

WIDTH = 6


class RandomNet(nn.Module):
    """Linear layers, each of which reads the input and the outputs of some of those before it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        chance = random.Random(seed)
        torch.manual_seed(seed)
        count = chance.randint(4, 8)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count)).double()
        self.reads = [[p for p in range(n) if chance.random() < 0.3] for n in range(count)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: list[torch.Tensor] = []
        for layer, reads in zip(self.layers, self.reads, strict=True):
            outputs.append(torch.tanh(layer(x + sum(outputs[p] for p in reads))))
        return torch.stack(outputs).sum(0)

    def chains(self) -> dict[str, int]:
        """The longest chain up to each layer, from what it reads."""
        longest: list[int] = []
        for reads in self.reads:
            longest.append(1 + max((longest[p] for p in reads), default=0))
        return {f"layers.{n}": length for n, length in enumerate(longest)}


class RandomHost(ModuleHost):
    def sites(self):
        return {f"layers.{n}": layer for n, layer in enumerate(self.model.layers)}


def random_lora(net: RandomNet, seed: int) -> Lora:
    torch.manual_seed(seed)
    return Lora(
        {
            f"layers.{n}": LowRank(torch.randn(WIDTH, 2).double(), torch.randn(2, WIDTH).double())
            for n in range(len(net.layers))
        }
    )


def gap(one: LowRank, other: LowRank) -> float:
    return float((one.dense() - other.dense()).norm() / other.dense().norm())


@pytest.mark.parametrize("seed", range(12))
def test_after_so_many_iterations_random_problems_are_solved(seed):
    net = RandomNet(seed)
    torch.manual_seed(100 + seed)
    data = [torch.randn(5, 7, WIDTH).double() for _ in range(2)]
    host = RandomHost(net, data)
    concepts = [Concept(random_lora(net, 2 * seed + i), prompts=["unused"]) for i in range(2)]
    found = depths(host.sites(), lambda: net(data[0]))
    assert found == net.chains()

    @cache
    def merged(schedule: str, iterations: int = 1) -> Lora:
        settings = {"objective": "adapter", "ridge": 1e-4, "precision": "float64"}
        return merge_loras(
            host, concepts, settings={**settings, "schedule": schedule, "iterations": iterations}
        ).lora

    wanted = merged("sweep").sites
    for iterations in range(iterations_bound(found) + 1):
        ours = merged("jacobi", 1 + iterations).sites  # the first solve is not counted
        right = {site for site in wanted if gap(ours[site], wanted[site]) < 1e-9}
        assert right >= {site for site, depth in found.items() if depth <= 1 + iterations}
    assert right == set(wanted)


def test_one_iteration_less_is_not_enough():
    net, data = Net(), make_data(2)
    host = ModuleHost(net, data)
    found = depths(host.sites(), lambda: net(data[0]))
    assert found == {"q": 1, "k": 1, "v": 1, "out": 2, "up": 3, "down": 4, "conv": 5}
    concepts = [Concept(make_lora(i), prompts=["unused"]) for i in (1, 2)]
    settings = {"precision": "float64", "schedule": "jacobi", "ridge": 1e-4}

    def moved(iterations: int) -> float:
        result = merge_loras(host, concepts, settings={**settings, "iterations": iterations})
        return result.report.convergence[-1]

    solves = 1 + iterations_bound(found)
    assert moved(solves) > 1e-3
    assert moved(solves + 1) < 1e-6  # rounding, as large as a processor's order of sums makes it
    assert len(SITES) > solves


def test_the_toyboxs_text_encoder():
    """12 sites of three layers: q, k and v of each are one step of the chain, out the next."""
    import toybox
    from iteris_core.hosts.diffusers import DiffusersHost

    host = DiffusersHost(toybox.load_pipeline())
    concepts = []
    for token in ("sks1", "sks4"):
        concept = toybox.concepts()[token]
        sites = host.read_lora(concept.lora).sites
        lora = Lora({site: c for site, c in sites.items() if site.startswith("text_encoder")})
        concepts.append(Concept(lora, trigger=token, class_word=concept.class_word))
    encoder = host.pipeline.text_encoder
    sites = {site: host.sites()[site] for site in concepts[0].lora.sites}
    found = depths(sites, lambda: encoder(torch.arange(1, 9)[None]))
    assert len(sites) == 12
    assert iterations_bound(found) == 2 * 3 - 1
    settings = {"schedule": "jacobi", "objective": "adapter", "ridge": 1e-4, "repair": False}
    calibration = Calibration(samples=8)

    def merged(iterations: int):
        return merge_loras(
            host,
            concepts,
            settings={**settings, "iterations": iterations, "saliency": 0.0},
            calibration=calibration,
        )

    last = merged(1 + iterations_bound(found) + 1).report.convergence
    assert last[-1] < 1e-4 < last[-2]
