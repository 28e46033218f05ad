"""Which sites are solved together, and which modules can be replayed."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import hooks_on
from torch import nn

from iteris_core.activations.barriers import watched, with_replayable
from iteris_core.activations.lockstep import Lockstep
from iteris_core.activations.micro_batch import MicroBatch
from iteris_core.activations.replay import Barriers
from iteris_core.errors import IterisError
from iteris_core.lora import LowRank, SiteChanges
from iteris_core.solve.choose import POLICY


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, context):
        q, k, v = self.q(x).unflatten(-1, (2, 4)), self.k(context), self.v(context)
        return self.o((q.flatten(-2) * k).tanh() + v)


class Block(nn.Module):
    """``spoil`` changes its input in place; ``forgetful`` gives something else every time."""

    spoil = forgetful = False

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up, self.down = Attention(), nn.Linear(8, 16), nn.Linear(16, 8)
        self.calls = 0

    def forward(self, x, *, context):
        self.calls += self.forgetful
        if self.spoil:
            x += self.attention(x, context)
        else:
            x = x + self.attention(x, context) * (1 + self.calls)
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(8, 8), nn.ModuleList(), nn.Linear(8, 8)
        for _ in range(2):
            self.blocks.append(Block())

    def forward(self, x):
        hidden = self.first(x)
        for block in self.blocks:
            hidden = block(hidden, context=x)
        return self.last(hidden)


def make():
    torch.manual_seed(0)
    model = Model().double()
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    changes = {}
    for name, module in modules.items():
        out, width = module.weight.shape
        up, down = torch.randn(out, 2).double() / 9, torch.randn(2, width).double()
        changes[name] = SiteChanges((LowRank(up, down),))
    return model, Lockstep(modules, changes)


def batch_of(model, x, observer=None, copies=1) -> MicroBatch:
    return MicroBatch(lambda: model(x), [0] * (len(x) // copies), copies, observer)


def levels_of(model, lockstep, most) -> Barriers:
    x = torch.randn(1, 3, 8).double()

    found = watched(lockstep, batch_of(model, x.clone()))
    error = POLICY.replay_error
    return with_replayable(found.barriers(most), lockstep, batch_of(model, x.clone()), error)


def names(barriers, model) -> list[str]:
    known = {module: name for name, module in model.named_modules()}
    return [known[block] for block in barriers.blocks]


def test_sites_whose_outputs_are_not_read_are_solved_together():
    model, lockstep = make()
    with lockstep:
        barriers = levels_of(model, lockstep, 0)
    assert barriers.ends["blocks.1.attention.v"] == tuple(f"blocks.1.attention.{n}" for n in "qkv")
    assert [len(level) for level in barriers.ends.values()] == [1, 3, 1, 1, 1, 3, 1, 1, 1, 1]
    assert not barriers.ends_at("blocks.0.attention.k")
    assert barriers.ends_at("a site that was not seen")
    assert not barriers.blocks
    assert hooks_on(model) == 0


def test_an_input_that_is_changed_in_place_ends_a_level():
    model, lockstep = make()

    class Other(Attention):
        def forward(self, x, context):
            q = self.q(x)
            x += 1
            k, v = self.k(context), self.v(context)
            return self.o(q + k + v)

    model.blocks[0].attention.__class__ = Other
    with lockstep:
        barriers = levels_of(model, lockstep, 0)
    assert barriers.ends["blocks.0.attention.q"] == ("blocks.0.attention.q",)
    assert barriers.ends["blocks.0.attention.v"] == ("blocks.0.attention.k", "blocks.0.attention.v")


class Clamping(nn.Linear):
    """As a layer in fp8 does it: what is too large for fp8 is cut from the input itself."""

    def forward(self, x):
        return super().forward(x.clamp_(-0.5, 0.5))


def test_g10_layers_that_clamp_their_input_in_place_share_it():
    """Keys and values of one context. What a layer before them received was not clamped yet, and
    waits as it was."""
    model, lockstep = make()
    groups = {}

    class Groups:
        def observe(self, shown):
            groups[shown.name] = shown.group

    attention = model.blocks[0].attention
    attention.k.__class__ = attention.v.__class__ = Clamping
    at = "blocks.0.attention."
    with lockstep:
        lockstep.run(batch_of(model, torch.randn(1, 3, 8).double(), Groups()))
        barriers = levels_of(model, lockstep, 0)
        assert groups[at + "k"] == groups[at + "v"] != groups["first"]
        assert barriers.ends[at + "v"] == tuple(at + n for n in "qkv")


def test_g10_a_layer_that_clamps_what_another_has_received_ends_a_level():
    model, lockstep = make()
    attention = model.blocks[0].attention
    attention.v.__class__ = Clamping
    at = "blocks.0.attention."
    with lockstep:
        barriers = levels_of(model, lockstep, 0)
    assert barriers.ends[at + "k"] == (at + "q", at + "k")
    assert barriers.ends[at + "v"] == (at + "v",)


@pytest.mark.parametrize(
    ("most", "wanted"),
    [
        (1, []),
        (2, ["blocks.0.attention", "blocks.1.attention"]),
        (4, ["blocks.0", "blocks.1"]),
        (9, ["blocks.0", "blocks.1"]),
        (10, [""]),
    ],
)
def test_blocks_are_the_largest_modules_of_so_many_levels(most, wanted):
    model, lockstep = make()
    with lockstep:
        barriers = levels_of(model, lockstep, most)
    assert names(barriers, model) == wanted


def test_a_block_that_writes_to_its_arguments_gets_copies_and_one_with_a_memory_is_none():
    model, lockstep = make()
    model.blocks[0].spoil, model.blocks[1].forgetful = True, True
    with lockstep:
        barriers = levels_of(model, lockstep, 4)
    assert names(barriers, model) == ["blocks.0"]
    assert [block.written for block in barriers.blocks.values()] == [{"[0][0]"}]


class Seen:
    def __init__(self) -> None:
        self.shown = {}

    def observe(self, shown):
        self.shown.setdefault(shown.name, []).append((shown.inputs.clone(), shown.outputs.clone()))


@pytest.mark.parametrize("spoil", [False, True])
@pytest.mark.parametrize("most", [0, 2, 4])
def test_a_sweep_in_levels_shows_and_gives_what_one_by_sites_does(most, spoil):
    torch.manual_seed(3)
    x = torch.randn(4, 3, 8).double()
    results = []
    for levels_at in (None, most):
        model, lockstep = make()
        for block in model.blocks:
            block.spoil = spoil
        outputs: dict[int, torch.Tensor] = {}
        seen = [Seen(), Seen()]
        order: list[str] = []

        def solve(site, lockstep=lockstep, order=order):
            order.append(site)
            return lockstep.changes[site][0]

        with lockstep:
            barriers = Barriers() if levels_at is None else levels_of(model, lockstep, levels_at)
            batches = [
                MicroBatch(
                    lambda i=i, model=model, outputs=outputs: outputs.update(
                        {i: model(torch.cat([x[2 * i : 2 * i + 2]] * 2))}
                    ),
                    [0, 0],
                    2,
                    seen[i],
                )
                for i in range(2)
            ]
            with lockstep.in_barriers(barriers):
                lockstep.sweep(batches, solve)
        assert hooks_on(model) == 0
        results.append((outputs, [s.shown for s in seen], order))
    (one, shown, order), (other, shown_there, order_there) = results
    assert order == order_there
    for i in range(2):
        assert torch.equal(one[i], other[i])
        assert torch.equal(one[i][:2], one[i][2:])  # the merged change is the LoRA's
        for site, (pair,) in shown[i].items():
            assert all(map(torch.equal, pair, shown_there[i][site][0])), site


def test_a_forward_that_takes_another_path_is_refused():
    model, lockstep = make()
    x = torch.randn(2, 3, 8).double()
    with lockstep:
        barriers = levels_of(model, lockstep, 4)
        model.blocks[1].attention.forward = lambda x, context: x
        with (
            lockstep.in_barriers(barriers),
            pytest.raises(IterisError, match="another path through the model"),
        ):
            lockstep.sweep([batch_of(model, x, copies=2)], lambda site: lockstep.changes[site][0])
    assert hooks_on(model) == 0


def test_modules_of_other_threads_are_not_watched():
    """Each thread is in the middle of a module of its own when the other one goes on."""
    arrived, left = threading.Barrier(2), threading.Barrier(2)

    class Waits(nn.Module):
        def forward(self, x):
            arrived.wait(5)
            left.wait(5)
            return x

    def watch(_):
        model = nn.Sequential(nn.Linear(8, 8), Waits(), nn.Linear(8, 8))
        sites = {"first": model[0], "last": model[2]}
        changes = {site: SiteChanges((None,)) for site in sites}

        batch = MicroBatch(lambda: model(torch.ones(1, 8)), [0], 1)
        with Lockstep(sites, changes) as lockstep:
            found = watched(lockstep, batch)
        return found.calls == Counter(model.modules()), found.inside["last"] == (model,)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(watch, range(2))) == [(True, True)] * 2
