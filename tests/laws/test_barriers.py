"""Which sites are solved together, and which modules can be replayed."""

import pytest
import torch
from oracle import hooks_on
from torch import nn

from iteris_core.activations.lockstep import Lockstep
from iteris_core.activations.micro_batch import MicroBatch
from iteris_core.activations.rows import Row
from iteris_core.activations.trace import Barriers, ExecutionTrace, alike, with_replayable
from iteris_core.errors import IterisError
from iteris_core.lora import LowRank, SiteChanges
from iteris_core.solve.choose import THRESHOLDS


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
    return MicroBatch(lambda: model(x), [Row(0, 0)] * (len(x) // copies), copies, observer)


def levels_of(model, lockstep, most) -> Barriers:
    x, trace = torch.randn(1, 3, 8).double(), ExecutionTrace()
    with trace:
        lockstep.run(batch_of(model, x.clone(), trace.observe))

    def run():
        lockstep.run(batch_of(model, x.clone()))

    return with_replayable(trace.barriers(most), run, THRESHOLDS.replay_error)


def names(barriers, model) -> list[str]:
    known = {module: name for name, module in model.named_modules()}
    return [known[block] for block in barriers.blocks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_outputs_are_alike_within_the_rounding_of_their_precision(dtype):
    x, noise = torch.randn(2, 4096, dtype=torch.float64)
    unit = max(THRESHOLDS.replay_error / 8, torch.finfo(dtype).eps)
    plain, rounded, other = ((x + size * unit * noise).to(dtype) for size in (0, 4, 16))
    assert alike([rounded], [plain], THRESHOLDS.replay_error)
    assert not alike([other], [plain], THRESHOLDS.replay_error)


class Clamping(nn.Linear):
    """As a layer in fp8 does it: what is too large for fp8 is cut from the input itself."""

    def forward(self, x):
        return super().forward(x.clamp_(-0.5, 0.5))


def test_a_block_that_writes_to_its_arguments_gets_copies_and_one_with_a_memory_is_none():
    model, lockstep = make()
    model.blocks[0].spoil, model.blocks[1].forgetful = True, True
    with lockstep:
        barriers = levels_of(model, lockstep, 4)
    assert names(barriers, model) == ["blocks.0"]
    assert list(barriers.written.values()) == [{"[0][0]"}]


def swept(lockstep, batches) -> list[str]:
    """The sites in the order in which they are to be solved; every change is its LoRA's."""
    order: list[str] = []
    for level in lockstep.sweep(batches):
        order += level
        lockstep.merged |= {site: lockstep.changes[site][0] for site in level}
    return order


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
            swept(lockstep, [batch_of(model, x, copies=2)])
    assert hooks_on(model) == 0


@pytest.mark.parametrize("unusual", ["blocks write to inputs", "layers clamp inputs"])
@pytest.mark.parametrize("most", [0, 2, 4])
def test_modules_that_write_to_their_inputs_give_the_same_in_levels(most, unusual):
    torch.manual_seed(3)
    x = torch.randn(2, 3, 8).double()
    results = []
    for at in (None, most):
        model, lockstep = make()
        for block in model.blocks:
            block.spoil = unusual == "blocks write to inputs"
            if unusual == "layers clamp inputs":
                block.attention.k.__class__ = block.attention.v.__class__ = Clamping
        outputs: list[torch.Tensor] = []

        def run(model=model, outputs=outputs):
            outputs.append(model(torch.cat([x] * 2)))

        with lockstep:
            barriers = Barriers() if at is None else levels_of(model, lockstep, at)
            with lockstep.in_barriers(barriers):
                order = swept(lockstep, [MicroBatch(run, [Row(0, 0)] * 2, 2)])
        assert hooks_on(model) == 0
        results.append((order, outputs[-1]))
    (order, one), (order_there, other) = results
    assert order == order_there
    assert torch.equal(one, other)
    assert torch.equal(one[:2], one[2:])  # the merged change is the LoRA's
