"""A model with changed norms and biases: applied once per forward, and restored afterwards."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from iteris_core.edit.resize import with_vectors

CHANGES = {"net.0.bias": torch.full((4,), 0.5), "net.scale": torch.full((4,), -0.25)}


class Scaled(nn.Module):
    """A vector of its own beside a layer in it; ``during`` is called between the two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.arange(4.0))
        self.add_module("0", nn.Linear(4, 4))
        self.during = lambda: None

    def forward(self, x):
        x = self.get_submodule("0")(x)
        self.during()
        return x * self.scale


class Host:
    def __init__(self, net: Scaled) -> None:
        self.net = net

    def parameters(self):
        return {"net.0.bias": self.net.get_submodule("0"), "net.scale": self.net}


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_a_forward_runs_once_with_the_changes_and_leaves_the_model_as_it_was(error):
    net, x, runs = Scaled(), torch.randn(3, 4), []
    changed = copy.deepcopy(net)
    for name, change in CHANGES.items():
        changed.get_parameter(name.removeprefix("net.")).data += change
    before = {name: (value, value.clone()) for name, value in net.named_parameters()}

    def during():
        runs.append(1)
        if error is not None:
            raise error

    net.during = during
    ends = nullcontext() if error is None else pytest.raises(error)
    with torch.no_grad(), ends, with_vectors(Host(net), CHANGES):
        torch.testing.assert_close(net(x), changed(x))
    assert runs == [1]
    for name, value in net.named_parameters():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1])
    assert not net._forward_hooks
    assert not net._forward_pre_hooks
