"""A model with changed norms and biases: applied once per forward, and restored afterwards."""

import copy

import pytest
import torch
from torch import nn

from iteris_core.edit.resize import with_vectors

CHANGES = {"net.0.bias": torch.full((4,), 0.5), "net.scale": torch.full((4,), -0.25)}


class Scaled(nn.Module):
    """A vector of its own beside a layer in it; ``during`` is called between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.arange(4.0))
        self.add_module("0", nn.Linear(4, 4))
        self.during = lambda: None
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        x = self.get_submodule("0")(x)
        self.during()
        return x * self.scale


class Host:
    def __init__(self, net: Scaled) -> None:
        self.net = net

    def parameters(self):
        return {"net.0.bias": self.net.get_submodule("0"), "net.scale": self.net}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Scaled()


def own(net):
    return {name: (value, value.clone()) for name, value in net.named_parameters()}


def is_as_it_was(net, before):
    after = dict(net.named_parameters())
    return after.keys() == before.keys() and all(
        after[name] is value and torch.equal(value, copied)
        for name, (value, copied) in before.items()
    )


def test_a_forward_runs_once_with_the_changes(net):
    x = torch.randn(3, 4)
    changed, before = copy.deepcopy(net), own(net)
    for name, change in CHANGES.items():
        changed.get_parameter(name.removeprefix("net.")).data += change
    with torch.no_grad(), with_vectors(Host(net), CHANGES):
        torch.testing.assert_close(net(x), changed(x))
        assert net.runs == 1
        assert is_as_it_was(net, before)
    assert is_as_it_was(net, before)
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whatever_ends_a_forward_the_model_is_as_it_was(net, error):
    def stop():
        raise error

    before, net.during = own(net), stop
    with pytest.raises(error), with_vectors(Host(net), CHANGES):
        net(torch.randn(3, 4))
    assert is_as_it_was(net, before)
