"""Rows that wait in host memory: the same result, with only one micro-batch on the device."""

import pytest
import torch
from forced_plans import CPU, recorded_pools
from oracle import ModuleHost, Net, hooks_on, make_data, make_lora
from tiny import two_concepts
from torch import nn

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.activations import host_pool
from iteris_core.activations.activation_offload import IDLE_PAUSES, ActivationOffload
from iteris_core.activations.host_pool import HostPool
from iteris_core.activations.lockstep import Lockstep
from iteris_core.activations.memory import MemoryMeter
from iteris_core.passes import planner

pytestmark = pytest.mark.usefixtures("unmeasured")

CALIBRATION = Calibration(
    samples=6, timesteps=3, denoising_steps=3, latents="noise", contexts=0.0, generic=0.0
)


@pytest.fixture
def apart(monkeypatch):
    """The CPU's memory passes for a device's, and its host memory for another's."""
    monkeypatch.setattr(planner, "is_apart", lambda device: True)


@pytest.fixture
def places(monkeypatch):
    return recorded_pools(monkeypatch)


class Turns(ActivationOffload):
    """Forwards by hand."""

    def __init__(self) -> None:
        super().__init__(HostPool(CPU, 1 << 20))

    def by(self, forward, run=lambda: None):
        self.turn(forward)
        made = run()
        self.rest()
        return made


def away(tensor) -> bool:
    return tensor.untyped_storage().nbytes() == 0


def test_weights_others_and_what_cannot_be_resized_are_left():
    layer = nn.Linear(4, 4)
    before = torch.ones(4)
    with Turns() as turns:
        turns._modules = [layer]

        def run():
            layer.weight.data = torch.eye(4) * 2  # brought to the device by offloading
            shared, fixed = torch.ones(6).share_memory_(), torch.ones(6)
            fixed.numpy()  # that is another's from now on
            return layer(before), shared, fixed, torch.ones(2).to_mkldnn()

        made = turns.by(0, run)
        assert not any(map(away, (layer.weight, before, *made[1:3])))
        assert away(made[0])


class Wrapped(torch.Tensor):
    """As a quantised weight: a subclass around a plain tensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [arg.inner if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def test_what_a_tensor_subclass_holds_is_put_back():
    with Turns() as turns:
        inner, outer = turns.by(0, lambda: (made := torch.ones(4).mul(3), Wrapped(made)))
        for _ in range(IDLE_PAUSES + 1):
            turns.by(0)
        assert away(inner)
        assert float(turns.by(0, lambda: float((outer + 1).sum()))) == 16


def merge(host, memory, on_progress=None):
    return merge_loras(
        host,
        two_concepts(host),
        calibration=CALIBRATION,
        memory_budget=memory,
        on_progress=on_progress,
    )


@pytest.mark.slow
def test_the_planned_peak_is_the_measured_one(host, apart, places, monkeypatch):
    plans, peaks, begun = [], [], []
    run, make = Lockstep.sweep, planner.plan_stage

    def watched(self, *args):
        begun.append(meter.live)  # the first: beside samples, before text encoders leave anything
        meter.peak = meter.live
        try:
            yield from run(self, *args)
        finally:
            peaks.append(meter.peak - begun[0])

    def kept(*args):
        plans.append(make(*args))
        return plans[-1]

    monkeypatch.setattr(Lockstep, "sweep", watched)
    monkeypatch.setattr(planner, "plan_stage", kept)
    for mib, host_mib in ((1000, 1000), (6, 1000), (3, 1000), (2, 7), (2, 3)):
        for module in (planner, host_pool):
            monkeypatch.setattr(module, "free_host", lambda size=host_mib: size << 20)
        begun.clear()
        with MemoryMeter() as meter:
            merge(host, mib * 2**20)
        made, peak = plans[-1], peaks[-1]
        assert (made.rows == 36) == (host_mib > 3)
        assert made.host_bytes <= host_mib << 20
        assert 0.8 * made.bytes <= peak <= 1.02 * made.bytes, made
    small, _ = (f"{planner.IN_HOST}, by {size}" for size in planner.BLOCKS)
    assert {p.strategy.name for p in plans} >= {planner.ON_DEVICE.name, small}
    assert places
    assert not any(memory.left for memory in places)


class Card(MemoryMeter):
    """A device of ``size`` bytes, whose allocator refuses what does not fit."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def _add(self, size: int) -> None:
        super()._add(size)
        if self.live > self.size:
            raise torch.OutOfMemoryError("CUDA out of memory")


def merge_on(card: Card, host, **settings):
    concepts = [Concept(make_lora(seed), prompts=["unused"]) for seed in (1, 2)]
    settings = {"precision": "float64", **settings}
    with card:
        return merge_loras(host, concepts, settings=settings, memory_budget=None)


def same(one, other, most=1e-9) -> bool:
    return all(
        (one.lora.sites[s].dense() - c.dense()).norm() <= most * c.dense().norm()
        for s, c in other.lora.sites.items()
    )


class Offloaded(ModuleHost):
    """Its first site is of another part of the model, whose weights are not where this part
    runs."""

    def sites(self):
        return {"text_encoder.fc": nn.Linear(2, 2, device="meta"), **super().sites()}


@pytest.mark.parametrize("kind", [ModuleHost, Offloaded])
def test_without_a_plan_rows_wait_in_host_memory_when_memory_runs_out(kind, places, monkeypatch):
    """There is a third of what all rows take while they wait; the model has no blocks."""
    monkeypatch.setattr(planner, "is_apart", lambda device: device == CPU)
    enough = Card(float("inf"))
    result = merge_on(enough, ModuleHost(Net(), make_data(rows=20)))
    host, card = kind(Net(), make_data(rows=20)), Card(0.33 * enough.peak)
    assert same(merge_on(card, host, micro_batch=8), result)
    assert places
    assert card.peak <= 1.05 * enough.peak  # the last of those that did not fit was refused
    assert hooks_on(host.model) == 0


@pytest.mark.parametrize(
    ("allowed", "total", "pinned"), [(2500, 10**9, 2048), (10**9, 12_000, 4096)]
)
def test_no_more_is_pinned_than_allowed(monkeypatch, allowed, total, pinned):
    """By the system; by the share of all memory. The rest is pageable."""
    sizes = {True: 0, False: 0}
    plain = torch.empty

    def empty(size, *, pin_memory=False, **more):
        if pin_memory and sizes[True] + size > allowed:
            raise RuntimeError("CUDA error: out of memory")
        sizes[pin_memory] += size
        return plain(size, **more)

    monkeypatch.setattr(host_pool.torch, "empty", empty)
    monkeypatch.setattr(host_pool, "_SLAB", 1024)
    monkeypatch.setattr(host_pool, "total_memory", lambda: total)
    memory = HostPool(torch.device("cuda"), 5120)
    for _ in range(5):
        memory._piece(900)
    assert sizes == {True: pinned, False: 5120 - pinned}
    assert memory.taken == 5120


@pytest.mark.slow
def test_a_merge_that_is_cancelled_gives_its_host_memory_back(host, apart, places):
    def stop(progress):
        if places and progress.what == "solving sites":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(host, 4 * 2**20, stop)
    assert places
    assert all(memory.left >= 0 for memory in places), "not closed"
