"""Rows that wait in host memory: the same result, with only one micro-batch on the device."""

from __future__ import annotations

import pytest
import torch
from oracle import ModuleHost, Net, hooks_on, make_data, make_lora
from tiny import two_concepts
from torch import nn

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.activations import host_pool
from iteris_core.activations.activation_offload import IDLE_PAUSES, ActivationOffload
from iteris_core.activations.host_pool import HostPool
from iteris_core.activations.lockstep import Lockstep
from iteris_core.activations.memory import MemoryMeter
from iteris_core.errors import OutOfMemory
from iteris_core.passes import planner, strategies, sweep
from iteris_core.solve.choose import THRESHOLDS, Thresholds

CPU = torch.device("cpu")
CALIBRATION = Calibration(
    samples=6, timesteps=3, denoising_steps=3, latents="noise", contexts=0.0, generic=0.0
)


@pytest.fixture
def apart(monkeypatch):
    """The CPU's memory passes for a device's, and its host memory for another's."""
    monkeypatch.setattr(planner, "is_apart", lambda device: True)
    monkeypatch.setattr(strategies, "is_apart", lambda device: True)


@pytest.fixture
def places(monkeypatch):
    """The host memories of the sweeps."""
    made: list[HostPool] = []

    class Recorded(HostPool):
        left = -1

        def close(self) -> None:
            self.left = held(self)
            super().close()

    def make(*args):
        made.append(Recorded(*args))
        return made[-1]

    monkeypatch.setattr(sweep, "HostPool", make)
    return made


def held(memory: HostPool) -> int:
    """Bytes that are in use."""
    gaps = sum(stop - start for slab in memory._slabs for start, stop in slab._gaps)
    return memory.taken - gaps


class Turns:
    """Two forwards by hand."""

    def __init__(self) -> None:
        self.memory = HostPool(CPU, 1 << 20)
        self.parking = ActivationOffload(self.memory)

    def __enter__(self):
        self.parking.__enter__()
        return self

    def __exit__(self, *error):
        self.parking.__exit__(*error)

    def turn(self, forward, run=lambda: None):
        self.parking.turn(forward)
        made = run()
        self.parking.rest()
        return made


def away(tensor) -> bool:
    return tensor.untyped_storage().nbytes() == 0


def test_weights_others_and_what_cannot_be_resized_are_left():
    layer = nn.Linear(4, 4)
    before = torch.ones(4)
    with Turns() as turns:
        turns.parking._modules = [layer]

        def run():
            layer.weight.data = torch.eye(4) * 2  # brought to the device by offloading
            shared, fixed = torch.ones(6).share_memory_(), torch.ones(6)
            fixed.numpy()  # that is another's from now on
            return layer(before), shared, fixed, torch.ones(2).to_mkldnn()

        made = turns.turn(0, run)
        assert not any(map(away, (layer.weight, before, *made[1:3])))
        assert turns.parking.left >= 48
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
        inner, outer = turns.turn(0, lambda: (made := torch.ones(4).mul(3), Wrapped(made)))
        for _ in range(IDLE_PAUSES + 1):
            turns.turn(0)
        assert away(inner)
        assert float(turns.turn(0, lambda: float((outer + 1).sum()))) == 16


def test_inference_tensors_wait_too():
    with torch.inference_mode(), Turns() as turns:
        tensor = turns.turn(0, lambda: torch.nn.functional.linear(torch.eye(3), torch.ones(2, 3)))
        assert tensor.is_inference()
        assert away(tensor)
        assert turns.turn(0, lambda: float(tensor.sum())) == 6


def merge(host, memory, thresholds=THRESHOLDS, **settings):
    return merge_loras(
        host,
        two_concepts(host),
        settings={"precision": "float64", **settings},
        calibration=CALIBRATION,
        memory_budget=memory,
        thresholds=thresholds,
    )


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.35, 0.15])
def test_the_result_is_the_same_and_the_plan_is_kept(host64, apart, places, share):
    """Held against the same rows at once that all wait on the device."""
    with MemoryMeter() as meter:
        merge(host64, 10**12)
    whole = meter.peak
    with MemoryMeter() as meter:
        parked = merge(host64, round(share * whole))
    line = parked.report.plan[-1]
    assert "waiting in host memory" in line
    assert "do not fit" not in line
    assert meter.peak <= share * whole + 2**20  # what samples take
    assert sum(memory.taken for memory in places) >= 2**20
    assert not any(memory.left for memory in places)
    rows = int(line.split(" at once")[0].split()[-1])
    there = merge(host64, None, micro_batch=rows)
    for site, change in there.lora.sites.items():
        ours, wanted = parked.lora.sites[site].dense(), change.dense()
        # Some processors sum in another order where memory lies otherwise.
        assert float((ours - wanted).norm()) <= 1e-11 * float(wanted.norm()), site


@pytest.mark.slow
def test_the_planned_peak_is_the_measured_one(host, apart, monkeypatch):
    plans, peaks = [], []
    sweep, make = Lockstep.sweep, planner.plan_stage

    def watched(self, *args):
        before = meter.peak = meter.live
        sweep(self, *args)
        peaks.append(meter.peak - before)

    def kept(*args):
        plans.append(make(*args))
        return plans[-1]

    monkeypatch.setattr(Lockstep, "sweep", watched)
    monkeypatch.setattr(planner, "plan_stage", kept)
    for mib in (1000, 12, 9, 6, 3):
        with MemoryMeter() as meter:
            merge(host, mib * 2**20, precision="float32")
        made, peak = plans[-1], peaks[-1]
        assert made.rows == 36
        assert 0.85 * made.bytes <= peak <= 1.02 * made.bytes, made
    assert {p.strategy.name for p in plans} >= {strategies.ON_DEVICE.name, strategies.IN_HOST}


@pytest.mark.slow
def test_host_memory_that_is_too_small_leaves_rows_out(host, apart, monkeypatch, caplog):
    monkeypatch.setattr(strategies, "free_memory", lambda device: 4 * 2**20)
    thresholds = Thresholds(blocks=())
    with caplog.at_level("WARNING"):
        result = merge(host, 4 * 2**20, thresholds=thresholds, precision="float32")
    line = result.report.plan[-1]
    assert "do not fit" in line
    assert "waiting in host memory" in line
    assert "lower samples, timesteps or latent_size" in caplog.text
    with pytest.raises(OutOfMemory, match=r"iB of host memory.*lower samples, timesteps or"):
        merge(host, 2**19, thresholds=thresholds, precision="float32")


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


@pytest.fixture
def whole():
    """A merge that had memory enough, and the peak of it."""
    card = Card(float("inf"))
    result = merge_on(card, ModuleHost(Net(), make_data(rows=20)))
    return result, card.peak


def same(one, other, most=1e-9) -> bool:
    return all(
        (one.lora.sites[s].dense() - c.dense()).norm() <= most * c.dense().norm()
        for s, c in other.lora.sites.items()
    )


def test_without_a_plan_rows_wait_in_host_memory_when_memory_runs_out(whole, apart, places):
    """There is a third of what all rows take while they wait."""
    result, peak = whole
    host = ModuleHost(Net(), make_data(rows=20))
    card = Card(0.33 * peak)
    assert same(merge_on(card, host, micro_batch=8), result)
    assert len(places) >= 1
    assert card.peak <= 1.05 * peak  # the last of those that did not fit was refused
    assert hooks_on(host.model) == 0


class Offloaded(ModuleHost):
    """Its first site is of another part of the model, whose weights are not where this part
    runs."""

    def sites(self):
        return {"text_encoder.fc": nn.Linear(2, 2, device="meta"), **super().sites()}


def test_g5_rows_wait_in_host_memory_whose_other_weights_are_offloaded(whole, monkeypatch, places):
    monkeypatch.setattr(strategies, "is_apart", lambda device: device == CPU)
    result, peak = whole
    card = Card(0.33 * peak)
    host = Offloaded(Net(), make_data(rows=20))
    assert same(merge_on(card, host, micro_batch=8), result)
    assert places


class Pinning:
    """``torch.empty``, of a system that lets ``most`` bytes be pinned."""

    def __init__(self, monkeypatch, most: float) -> None:
        self.most, self.pinned, self.pageable, self.emptied = most, 0, 0, 0
        plain = torch.empty

        def empty(size, *, pin_memory=False, **more):
            if pin_memory and self.pinned + size > self.most:
                raise RuntimeError("CUDA error: out of memory")
            self.pinned += size if pin_memory else 0
            self.pageable += 0 if pin_memory else size
            return plain(size, **more)

        def give_back() -> None:
            self.emptied += 1

        monkeypatch.setattr(host_pool.torch, "empty", empty)
        monkeypatch.setattr(host_pool, "empty_host_cache", give_back)
        monkeypatch.setattr(host_pool, "_SLAB", 1024)
        monkeypatch.setattr(host_pool, "wait_for", lambda device: None)


def fill(memory: HostPool, size: int) -> None:
    for _ in range(size // 1024):
        memory._piece(900)


def test_g7_what_the_system_does_not_pin_is_pageable(monkeypatch):
    system = Pinning(monkeypatch, 2500)
    memory = HostPool(torch.device("cuda"), 5120)
    fill(memory, 5120)
    assert (system.pinned, system.pageable) == (2048, 3072)
    assert memory.taken == 5120


def test_what_was_tried_is_said_when_nothing_helps(whole):
    host = ModuleHost(Net(), make_data(rows=20))
    weights = [weight.clone() for weight in host.model.parameters()]
    with pytest.raises(OutOfMemory, match="Out of memory in the model") as caught:
        merge_on(Card(0.3 * whole[1]), host)
    said = str(caught.value)
    tried = said.partition("Tried: ")[2].partition(". Lower")[0].split("; ")
    assert tried[:2] == [
        "32 rows at once, waiting on the device",
        "32 rows at once, waiting on the device, by large blocks",
    ]
    assert tried[-1].startswith("one row at once, waiting on the device, by ")
    assert "Lower samples or timesteps (fewer rows), or latent_size" in said
    assert hooks_on(host.model) == 0
    assert all(map(torch.equal, weights, host.model.parameters()))


def test_g7_no_more_is_pinned_than_an_application_leaves_or_two_fifths_of_all(monkeypatch):
    system = Pinning(monkeypatch, float("inf"))
    monkeypatch.setattr(host_pool, "total_memory", lambda: 12_000)
    fill(HostPool(torch.device("cuda"), 10240), 10240)
    assert (system.pinned, system.pageable) == (4096, 6144)
    system.pinned = system.pageable = 0
    with host_pool.pinning_at_most(1500):
        memory = HostPool(torch.device("cuda"), 10240)
    fill(memory, 4096)
    assert (system.pinned, system.pageable) == (1024, 3072)


@pytest.mark.slow
def test_g7_a_merge_that_is_cancelled_gives_its_host_memory_back(host, apart, places):
    def stop(progress):
        if places and progress.what == "solving sites":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_loras(
            host,
            two_concepts(host),
            calibration=CALIBRATION,
            memory_budget=4 * 2**20,
            on_progress=stop,
        )
    assert places
    assert all(memory.left >= 0 for memory in places), "not closed"
