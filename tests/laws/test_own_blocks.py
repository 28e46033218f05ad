"""RegMean++ a block at a time: each LoRA's own layers on what the merged blocks before give."""

import copy

import pytest
import rivals  # noqa: F401 (registers them)
import torch
from oracle import ModuleHost, changed, dense_changes, difference, hooks_on, make_data
from torch import nn
from torch.nn import functional as F

from iteris_core import Concept, Lora, LowRank, merge_loras


class Block(nn.Module):
    """A residual around so many layers"""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(layers))

    def forward(self, x, **_):
        h = x
        for layer in self.layers:
            h = F.gelu(layer(h))
        return (x + h,)


class Blocks(nn.Module):
    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(layers) for _ in range(3))
        self.double()

    def forward(self, x):
        for block in self.blocks:
            (x,) = block(x)
        return x

    def linear(self):
        return {n: m for n, m in self.named_modules() if isinstance(m, nn.Linear)}


class BlocksHost(ModuleHost):
    def sites(self):
        return self.model.linear()


def random_loras(model, count=3):
    generator = torch.Generator().manual_seed(1)

    def change():
        up, down = torch.randn(2, 24, generator=generator, dtype=torch.float64)
        return LowRank(up.reshape(12, 2), down.reshape(2, 12) / 24**0.5)

    return [Lora({name: change() for name in model.linear()}) for _ in range(count)]


def merge(model, loras, data, method="regmean++-blocks", **settings):
    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    return merge_loras(BlocksHost(model, data), concepts, method, settings=settings).lora


@torch.no_grad()
def blockwise(base, tuned, data, shrink):
    """Block by block, each layer on the inputs that every LoRA's own block has there."""
    merged, seen, wanted = copy.deepcopy(base), list(data), {}
    for number, block in enumerate(merged.blocks):
        for index, layer in enumerate(block.layers):
            right = left = 0
            for model, x in zip(tuned, seen, strict=True):
                own = model.blocks[number]
                h = x
                for before in own.layers[:index]:
                    h = F.gelu(before(h))
                gram = h.flatten(0, 1).mT @ h.flatten(0, 1)
                gram = shrink * gram + (1 - shrink) * gram.diag().diag()
                left, right = left + gram, right + own.layers[index].weight @ gram
            before = base.blocks[number].layers[index].weight
            wanted[f"blocks.{number}.layers.{index}"] = right @ torch.linalg.inv(left) - before
            layer.weight.copy_(right @ torch.linalg.inv(left))
        seen = [block(x)[0] for x in seen]
    return wanted


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_layer_is_fitted_on_each_loras_own_block(layers):
    base, data = Blocks(layers), make_data(3)
    loras = random_loras(base)
    tuned = [changed(base, dense_changes(lora)) for lora in loras]
    wanted = blockwise(base, tuned, data, 0.9)
    for batch in (32, 4):
        ours = merge(base, loras, data, shrink=0.9, micro_batch=batch)
        assert difference(ours, wanted) < 1e-5
    plain = merge(base, loras, data, "regmean++", shrink=0.9)
    assert (difference(plain, wanted) < 1e-5) == (layers == 1)
    assert hooks_on(base) == 0
