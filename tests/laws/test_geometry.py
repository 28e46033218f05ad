"""Sites that receive the same tensor and split it into tokens in different ways."""

import pytest
import torch
from oracle import ModuleHost
from torch import nn

from iteris_core import Concept, Lora, LowRank, merge_loras
from iteris_core.activations.site import site_of
from iteris_core.errors import IterisError


class Forked(nn.Module):
    """Convolutions of different strides, kernels, paddings and dilations on one tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Conv2d(3, 4, 3, padding=1)
        self.strided = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.point = nn.Conv2d(3, 4, 1)
        self.dilated = nn.Conv2d(3, 4, 3, padding=2, dilation=2)
        self.double()

    def forward(self, x):
        parts = [self.wide(x), self.strided(x), self.point(x), self.dilated(x)]
        return torch.cat([part.flatten(1) for part in parts], dim=1)


class ForkedHost(ModuleHost):
    def sites(self):
        return dict(self.model.named_children())


def random_lora(modules, seed, rank=2):
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name, module in modules.items():
        site = site_of(name, module)
        out, width = site.shape
        up = torch.randn(out, rank, generator=generator)
        down = torch.randn(rank, width, generator=generator) / width**0.5
        change = LowRank(up, down, site.kernel)
        changes[name] = change.to(module.weight.dtype)
    return Lora(changes, f"lora-{seed}")


@pytest.mark.parametrize("objective", ["adapter", "output"])
@pytest.mark.parametrize("schedule", ["sweep", "jacobi"])
def test_convolutions_of_one_tensor_give_one_lora_back(objective, schedule):
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(9, 3, 8, 8, generator=generator, dtype=torch.float64)]
    host = ForkedHost(Forked(), data)
    lora = random_lora(host.sites(), 3)
    settings = {
        "objective": objective,
        "schedule": schedule,
        "iterations": 2,
        "precision": "float64",
        "micro_batch": 4,
    }
    merged = merge_loras(host, [Concept(lora, prompts=["unused"])], settings=settings).lora
    for site, change in lora.sites.items():
        gap = merged.sites[site].dense() - change.dense()
        assert gap.norm() <= 1e-8 * change.dense().norm(), site


def test_what_is_no_site_is_said():
    with pytest.raises(IterisError, match="grouped"):
        site_of("x", nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(IterisError, match="neither a linear layer"):
        site_of("x", nn.LayerNorm(4))
