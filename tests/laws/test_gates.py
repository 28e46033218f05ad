"""Streams behind gates: found by running the model, and repaired as the equation says."""

import pytest
import torch
from oracle import difference, hooks_on
from test_repair import (
    RIDGE,
    WIDTH,
    Host,
    Net,
    Plain,
    dense_sweep,
    final_error,
    make_data,
    make_lora,
    merge,
)
from torch import nn
from torch.nn import functional as F

from iteris_core.activations.streams import find_streams
from iteris_core.solve.choose import Thresholds


class Gated(Plain):
    """``m`` makes the gates of ``o`` and of ``f`` from the condition; that of ``f`` through tanh
    and with a constant."""

    leaves = "mof"

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x, condition):
        one, two = self.gates(self.m(condition))
        x = x + one[:, None] * self.o(self.norm1(x).tanh())
        return x + two[:, None] * self.f(F.gelu(self.e(self.norm2(x))))

    def gates(self, made):
        one, two = made.chunk(2, -1)
        return one, two.tanh() + self.table

    @staticmethod
    def scale(net, site, y):
        """By which an output is multiplied before its gate."""
        return 1.0


class Sandwiched(Gated):
    """With an RMS norm between ``o`` and its gate, as Z-Image has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm3 = nn.RMSNorm(WIDTH, eps=1e-6)
        nn.init.uniform_(self.norm3.weight, 0.5, 2.0)

    def forward(self, x, condition):
        one, two = self.gates(self.m(condition))
        x = x + one[:, None] * self.norm3(self.o(self.norm1(x).tanh()))
        return x + two[:, None] * self.f(F.gelu(self.e(self.norm2(x))))

    @staticmethod
    def scale(net, site, y):
        if not site.endswith("o"):
            return 1.0
        norm = net.get_submodule(site[:-1] + "norm3").weight.detach()
        return norm / (y**2).mean(-1, keepdim=True).sqrt()


class Normed(Gated):
    """Normalises what it adds by the mean too, so no gate on the layer's output is what it adds."""

    def forward(self, x, condition):
        one, two = self.gates(self.m(condition))
        x = x + one[:, None] * self.norm2(self.o(self.norm1(x)))
        return x + two[:, None] * self.norm1(self.f(F.gelu(self.e(x))))


class ByToken(Gated):
    """Gates each token by itself."""

    def forward(self, x, condition):
        made = self.m(x)
        x = x + made[..., :WIDTH] * self.o(self.norm1(x))
        return x + made[..., WIDTH:] * self.f(F.gelu(self.e(self.norm2(x))))


def found_in(model, data):
    with torch.no_grad():
        return find_streams(lambda: model(data[:2]), 2, Host(model, [data]).sites(), model)


def test_gates_are_found_and_nothing_stays():
    model, (data,) = Net(Gated), make_data(1)
    found = found_in(model, data)
    assert set(found) == set(model.order()) - {"blocks.0.m", "blocks.1.m"}
    assert hooks_on(model) == 0
    for site, stream in found.items():
        block = model.get_submodule(site.rpartition(".")[0])
        assert stream.source.module in (block, block.norm1, block.norm2)
        made = block.m(data[:, 0])
        wanted = block.gates(made)[site.endswith("f")]
        gate = stream.gates(made, len(data))
        torch.testing.assert_close(gate.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [Normed, ByToken])
def test_what_cannot_be_told_apart_has_no_stream(block):
    assert found_in(Net(block), make_data(1)[0]) == {}


@pytest.mark.parametrize(("block", "at_once"), [(Gated, 2), (Gated, 20), (Sandwiched, 20)])
def test_a_sweep_repairs_behind_gates_as_the_equation_says(block, at_once):
    loras, data = [make_lora(1, block), make_lora(2, block)], make_data()
    settings = {"rank": 100, "ridge": RIDGE, "bound": 0.0, "weighting": "tokens"}
    settings |= {"micro_batch": at_once, "thresholds": Thresholds(repair_share=1.0)}
    ours = merge(loras, data, Net(block), pictures=True, **settings)
    assert {s for s, of in ours.report.sites.items() if of.repair} == {"blocks.0.f", "blocks.1.f"}
    # Gates are found in float32.
    assert difference(ours.lora, dense_sweep(loras, data, block)) < 1e-5


def test_repair_behind_gates_brings_the_output_closer():
    loras, data = [make_lora(i, Gated) for i in (1, 2, 3)], make_data(3)
    repaired, plain = (
        merge(loras, data, Net(Gated), pictures=True, repair=on, bound=0.0).lora
        for on in (True, False)
    )
    assert set(plain.sites) == set(loras[0].sites)
    assert final_error(repaired, loras, data, Gated) < 0.95 * final_error(plain, loras, data, Gated)
