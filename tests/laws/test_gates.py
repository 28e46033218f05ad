"""Streams behind gates: found by running the model, and repaired as the equation says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import ModuleHost, changed, difference, hooks_on
from torch import nn
from torch.nn import functional as F

from iteris_core import Concept, Lora, LowRank, merge_loras
from iteris_core.activations.streams import find_streams

WIDTH, RIDGE, REPAIR = 8, 1e-4, 0.3


class Block(nn.Module):
    """``m`` makes the gates of ``o`` and of ``f`` from a row's first token; that of ``f`` through
    tanh and with a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.m, self.o = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.e, self.f = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x, condition):
        one, two = self.gates(self.m(condition))
        x = x + one[:, None] * self.o(self.norm1(x).tanh())
        return x + two[:, None] * self.f(F.gelu(self.e(self.norm2(x))))

    def gates(self, made):
        one, two = made.chunk(2, -1)
        return one, two.tanh() + self.table


class Net(nn.Module):
    def __init__(self, block=Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([block(), block()])
        self.double()

    def forward(self, rows):
        condition, x = rows[:, 0], rows[:, 1:]
        for block in self.blocks:
            x = block(x, condition)
        return x


ORDER = [f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("m", "o", "f")]
LORA_SITES = [site for site in ORDER if not site.endswith("f")]


class Host(ModuleHost):
    pictures = True

    def sites(self):
        return {site: self.model.get_submodule(site) for site in ORDER}

    def stages(self, samples, sites):
        for stage in super().stages(samples, sites):
            yield replace(stage, spatial=True, picture=(1, 12))


def make_lora(seed: int) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    shapes = {s: Net().get_submodule(s).weight.shape for s in LORA_SITES}
    return Lora({s: LowRank(make(o, 2), make(2, i) / 3) for s, (o, i) in shapes.items()}, f"{seed}")


def make_data(count: int = 2):
    generator = torch.Generator().manual_seed(9)
    return [
        torch.randn(5, 13, WIDTH, generator=generator, dtype=torch.float64) for _ in range(count)
    ]


def merge(loras, data, model=None, **settings):
    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    host = Host(model or Net(), data)
    return merge_loras(host, concepts, settings={"precision": "float64", **settings})


def seen_at(model, site, data):
    """The site's inputs, outputs, stream and gate, (rows, tokens, …)."""
    block, leaf = model.get_submodule(site.rpartition(".")[0]), site[-1]
    found = {}
    norm = block.norm1 if leaf == "o" else block.norm2
    handles = [
        norm.register_forward_pre_hook(lambda _, args: found.update(stream=args[0])),
        block.m.register_forward_hook(lambda _, args, out: found.update(gates=block.gates(out))),
        model.get_submodule(site).register_forward_hook(
            lambda _, args, out: found.update(x=args[0], y=out)
        ),
    ]
    with torch.no_grad():
        model(data)
    for handle in handles:
        handle.remove()
    if leaf == "m":
        return found["x"][:, None], found["y"][:, None], None, None
    return found["x"], found["y"], found["stream"], found["gates"][leaf == "f"][:, None]


def dense_sweep(loras, data, block=Block):
    """The docstring's equation, site by site, with real weights and plain inverses."""
    merged = {}
    for site in ORDER:
        w0 = Net(block).get_submodule(site).weight.detach()
        left, right = 0.0, torch.zeros_like(w0)
        for lora, rows in zip(loras, data, strict=True):
            own = {s: c.dense() for s, c in lora.sites.items()}
            _, y, h, g = seen_at(changed(Net(block), own), site, rows)
            xt, base, ht, gt = seen_at(changed(Net(block), merged), site, rows)
            if h is not None and block is Sandwiched and site.endswith("o"):
                norm = Net(block).get_submodule(site[:-1] + "norm3").weight.detach()
                size = (y**2).mean(-1, keepdim=True).sqrt()
                g, gt = g * norm / size, gt * norm / size
            target = y - base
            if h is not None:
                sizes = [(some**2).mean(2, keepdim=True) for some in (ht, y)]
                least = REPAIR**2 * sizes[0] / sizes[1]
                target = target + (h - ht + (g - gt) * y) * gt / (gt**2 + least)
            target, xt = (some.reshape(-1, some.shape[-1]) for some in (target, xt))
            gram = xt.mT @ xt
            pull = RIDGE * gram.norm()
            left += (gram + pull * torch.eye(len(gram)).double()) / len(xt)
            right += (target.mT @ xt + pull * own.get(site, torch.zeros_like(w0))) / len(xt)
        merged[site] = right @ torch.linalg.inv(left)
    return merged


def test_gates_are_found_and_nothing_stays():
    model, (data,) = Net(), make_data(1)
    with torch.no_grad():
        found = find_streams(lambda: model(data[:2]), 2, Host(model, [data]).sites())
    assert set(found) == set(ORDER) - {"blocks.0.m", "blocks.1.m"}
    assert hooks_on(model) == 0
    for site, stream in found.items():
        block = model.get_submodule(site.rpartition(".")[0])
        assert stream.source.module in (block, block.norm1, block.norm2)
        made = block.m(data[:, 0])
        gate = stream.gate.of(made, len(data))
        wanted = block.gates(made)[site.endswith("f")]
        torch.testing.assert_close(gate.double(), wanted, rtol=1e-4, atol=1e-4)


class Sandwiched(Block):
    """With an RMS norm between ``o`` and its gate, as Z-Image has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm3 = nn.RMSNorm(WIDTH, eps=1e-6)
        nn.init.uniform_(self.norm3.weight, 0.5, 2.0)

    def forward(self, x, condition):
        one, two = self.gates(self.m(condition))
        x = x + one[:, None] * self.norm3(self.o(self.norm1(x).tanh()))
        return x + two[:, None] * self.f(F.gelu(self.e(self.norm2(x))))


class Normed(Block):
    """Normalises what it adds by the mean too, so no gate on the layer's output is what it adds."""

    def forward(self, x, condition):
        one, two = self.gates(self.m(condition))
        x = x + one[:, None] * self.norm2(self.o(self.norm1(x)))
        return x + two[:, None] * self.norm1(self.f(F.gelu(self.e(x))))


class ByToken(Block):
    """Gates each token by itself."""

    def forward(self, x, condition):
        made = self.m(x)
        x = x + made[..., :WIDTH] * self.o(self.norm1(x))
        return x + made[..., WIDTH:] * self.f(F.gelu(self.e(self.norm2(x))))


@pytest.mark.parametrize("block", [Normed, ByToken])
def test_what_cannot_be_told_apart_has_no_stream(block):
    model, (data,) = Net(block), make_data(1)
    with torch.no_grad():
        assert find_streams(lambda: model(data[:2]), 2, Host(model, [data]).sites()) == {}


@pytest.mark.parametrize(("block", "at_once"), [(Block, 2), (Block, 20), (Sandwiched, 20)])
def test_a_sweep_repairs_behind_gates_as_the_equation_says(block, at_once):
    loras, data = [make_lora(1), make_lora(2)], make_data()
    ours = merge(
        loras,
        data,
        Net(block),
        rank=100,
        ridge=RIDGE,
        bound=0.0,
        weighting="tokens",
        repair_inputs=1.0,
        micro_batch=at_once,
    )
    assert {s for s, of in ours.report.sites.items() if of.repair} == {"blocks.0.f", "blocks.1.f"}
    away = difference(ours.lora, dense_sweep(loras, data, block))
    assert away < 1e-5  # gates are found in float32


def test_repair_behind_gates_brings_the_output_closer():
    loras, data = [make_lora(i) for i in (1, 2, 3)], make_data(3)

    def error(lora):
        wrong = whole = 0.0
        with torch.no_grad():
            for own, rows in zip(loras, data, strict=True):
                apart, ours = (
                    changed(Net(), {s: c.dense() for s, c in some.sites.items()})(rows)
                    for some in (own, lora)
                )
                wrong += float((ours - apart).square().sum())
                whole += float((Net()(rows) - apart).square().sum())
        return wrong / whole

    settings = {"bound": 0.0}
    repaired, plain = (merge(loras, data, repair=on, **settings).lora for on in (True, False))
    assert set(plain.sites) == set(LORA_SITES)
    assert error(repaired) < 0.95 * error(plain)
