"""Gradients through blocks that run again for them: right whatever a block does to its tensors, and
nothing is left on a model."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from iteris_core import LowRank
from iteris_core.activations.gradients import Network, constant_weights, saved_tensors
from iteris_core.activations.memory import MemoryMeter

WIDTH = 8


class Block(nn.Module):
    """A feed-forward with a change of its own, which may write to its argument."""

    def __init__(self, *, in_place: bool, viewed: bool = False) -> None:
        super().__init__()
        self.norm, self.in_place, self.viewed = nn.LayerNorm(WIDTH), in_place, viewed
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        up, down = 0.3 * torch.randn(4 * WIDTH, 2), 0.3 * torch.randn(2, WIDTH)
        self.change = LowRank(up.double().requires_grad_(), down.double().requires_grad_())

    def forward(self, x, *, options):
        options["seen"].append(len(x))
        hidden = self.norm(x)
        changed = self.up(hidden) + hidden @ self.change.down.mT @ self.change.up.mT
        if self.in_place:  # the norm needs what x was
            x += self.down(changed.sigmoid())
        else:
            x = x + self.down(changed.sigmoid())
        return {"x": x.flatten().view(x.shape) if self.viewed else x, "scale": options["scale"]}


class Model(nn.Module):
    """``outside``: it writes, between its blocks, to what a gradient needs. ``viewed``: its blocks'
    outputs are views. It writes to a part of them."""

    def __init__(
        self,
        *,
        in_place: bool = False,
        outside: bool = False,
        viewed: bool = False,
        count: int = 3,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(in_place=in_place, viewed=viewed) for _ in range(count))
        self.first, self.outside = nn.Linear(WIDTH, WIDTH), outside
        self.double()

    def forward(self, x):
        h, total = self.first(x).tanh() + 1.0, 0.0
        for block in self.blocks:
            total = total + (h * h).mean()
            if self.outside:
                h += 0.5
            else:
                h = h + 0.5
            found = block(h.clone(), options={"seen": [], "scale": x.new_tensor(2.0)})
            found["x"][:, :2] += 1.0
            h = found["x"] * found["scale"]
        return total + h.square().mean()


def gradients(model, x, *, again: bool, mutable: bool = False):
    factors = {str(number): block.change for number, block in enumerate(model.blocks)}
    written = frozenset({"[0][0]"} if model.blocks[0].in_place else ())
    blocks = {block: (written, [str(n)]) for n, block in enumerate(model.blocks)}
    leaves = [leaf for of in factors.values() for leaf in (of.up, of.down)]
    network = Network(model, blocks, torch.device("cpu"), blocks.keys(), replays=again)
    with network.differentiable(factors, nullcontext), saved_tensors(mutable=mutable):
        model(x).backward(inputs=leaves)
    return [leaf.grad for leaf in leaves]


def rows(count: int = 5):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("in_place", [False, True])
def test_blocks_that_run_again_have_the_same_gradients(in_place):
    model = Model(in_place=in_place)
    mutable = in_place
    for found, wanted in zip(
        gradients(model, rows(), again=True, mutable=mutable),
        gradients(Model(), rows(), again=False),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_a_view_that_a_block_returns_may_be_written_to():
    """As HunyuanDiT's embedder of texts returns one."""
    wanted = gradients(Model(), rows(), again=False)
    assert all(map(torch.allclose, gradients(Model(viewed=True), rows(), again=True), wanted))


@pytest.mark.parametrize("where", ["in_place", "outside"])
def test_what_changes_a_tensor_that_a_gradient_needs_is_noticed(where):
    with pytest.raises(RuntimeError, match="inplace"):
        gradients(Model(**{where: True}), rows(), again=True)
    wanted = gradients(Model(), rows(), again=False)
    found = gradients(Model(**{where: True}), rows(), again=True, mutable=True)
    assert all(map(torch.allclose, found, wanted))


@pytest.mark.parametrize("again", [True, False])
def test_weights_may_leave_after_every_forward(again):
    """As with offloading by layers, which takes a weight's storage away."""
    wanted, model = gradients(Model(), rows(), again=again), Model()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.data

            def enter(layer, _, weight=weight):
                layer.weight.data = weight

            def leave(layer, *_):
                layer.weight.data = torch.full_like(layer.weight, torch.nan)

            layer.register_forward_pre_hook(enter)
            layer.register_forward_hook(leave)
    assert all(map(torch.equal, gradients(model, rows(), again=again), wanted))


def test_only_one_block_has_its_activations_at_a_time():
    def peak(*, again):
        model = Model(count=12)
        with MemoryMeter() as meter:
            gradients(model, rows(4096), again=again)
        return meter.peak

    assert peak(again=True) < 0.6 * peak(again=False)


class Wrapped(torch.Tensor):
    """A tensor with something that belongs to it, as quantised weights of other packs."""


def test_weights_of_inference_mode_are_replaced_by_others_of_the_same_storage():
    with torch.inference_mode():
        model = Model()
        model.first.weight = nn.Parameter(model.first.weight.as_subclass(Wrapped))
        model.first.weight.kind = "Q8"
        model.register_buffer("table", torch.ones(3))
    before = dict(model.named_parameters())
    with constant_weights(model):
        for name, weight in model.named_parameters():
            assert not weight.is_inference()
            assert not weight.requires_grad
            assert weight.data_ptr() == before[name].data_ptr()
        assert type(model.first.weight) is Wrapped
        assert model.first.weight.kind == "Q8"
        assert not model.table.is_inference()
    assert all(before[name] is weight for name, weight in model.named_parameters())
    assert model.table.is_inference()


def test_arguments_of_inference_mode_are_taken():
    with torch.inference_mode():
        x = rows()
    assert all(
        map(torch.equal, gradients(Model(), x, again=True), gradients(Model(), rows(), again=True))
    )
