"""What waits in host memory at 8 bits, and a merge whose rows wait so."""

from __future__ import annotations

import copy

import pytest
import torch
from bases import make_lora, tiny
from test_ways import CPU

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.activations.host_pool import HostPool
from iteris_core.activations.packing import GROUP, PackedPlace, pack, unpack
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.passes import planner, strategies, sweep
from iteris_core.passes.footprint import MemoryLimits
from iteris_core.passes.plan import Plan, plan_stage
from iteris_core.passes.strategies import Strategy, find, replayable
from iteris_core.preview import preview_merge


def sd3():
    """In half precision, with LoRAs of its denoiser."""
    host = DiffusersHost(copy.deepcopy(tiny("sd3")).to(torch.bfloat16))
    sites = tuple(site for site in host.sites() if site.startswith("transformer."))
    loras = (make_lora("sd3", sites, seed) for seed in (1, 2))
    return host, [Concept(lora, trigger=f"s{n}", class_word="dog") for n, lora in enumerate(loras)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, GROUP, 3 * GROUP + 5, GROUP * (1 << 15) + 7])
def test_a_value_is_off_by_half_a_step_of_its_group_at_most(dtype, count):
    torch.manual_seed(0)
    values = (torch.randn(count) * torch.logspace(-6, 3, count)).to(dtype)
    packed, found = pack(values), torch.empty_like(values)
    assert packed.dtype is torch.uint8
    assert len(packed) == -(-count // GROUP) * (GROUP + 4)
    unpack(packed, found)
    padded = torch.nn.functional.pad(values.double(), (0, -count % GROUP)).view(-1, GROUP)
    step = (padded.abs().amax(1) / 127).repeat_interleave(GROUP)[:count]
    rounding = values.double().abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    assert ((found.double() - values.double()).abs() <= 0.51 * step + rounding).all()
    again = torch.empty_like(values)
    unpack(pack(found), again)
    assert ((again.double() - found.double()).abs() <= rounding).all(), "packed twice as once"


def test_zeros_and_infinities():
    values = torch.tensor([0.0] * GROUP + [0.0, -torch.inf, torch.inf], dtype=torch.bfloat16)
    found = torch.empty_like(values)
    unpack(pack(values), found)
    assert not found[:-2].any()
    most = torch.finfo(torch.bfloat16).max
    assert found[-2:].tolist() == pytest.approx([-most, most], rel=1e-2)


def test_only_large_tensors_in_half_precision_are_packed():
    memory = HostPool(CPU, 1 << 20)
    place = PackedPlace(memory, least=1024)
    torch.manual_seed(0)
    kinds = (torch.bfloat16, 4096, 0.51), (torch.bfloat16, 256, 1), (torch.float32, 4096, 1)
    for dtype, count, share in kinds:
        tensor = torch.randn(count).to(dtype)
        before, storage = tensor.clone(), tensor.untyped_storage()
        slot = place.put(storage, dtype)
        assert storage.nbytes() == 0
        assert slot.nbytes == pytest.approx(share * before.nbytes, rel=0.02)
        place.fill(storage, slot)
        assert tensor.dtype is dtype
        gap = (tensor - before).norm() / before.norm()
        assert gap == 0 if share == 1 else 0 < gap < 0.01
        place.empty(storage)
        place.free(slot)
    assert all(slab._gaps == [(0, len(slab._memory))] for slab in memory._slabs)


def test_a_merge_with_rows_at_8_bits_is_nearly_the_same(monkeypatch):
    host, concepts = sd3()
    monkeypatch.setattr(strategies, "PackedPlace", lambda place: PackedPlace(place, least=64))
    moved: list[int] = []

    def merged(*, offloads, packs):
        def planned(run, stage, _, batching, **__):
            barriers = replayable(stage, run.lockstep, find(stage, run.lockstep).barriers(8))
            strategy = Strategy(barriers=barriers, offloads=offloads, packs=packs)
            return Plan(stage, batching.rows, strategy, host_limit=1 << 30)

        class Counted(HostPool):
            def close(self):
                moved.append(self.moved)
                super().close()

        monkeypatch.setattr(sweep, "planned", planned)
        monkeypatch.setattr(sweep, "HostPool", Counted)
        calibration = Calibration(samples=4, timesteps=2, denoising_steps=2, latent_size=8, seed=3)
        return merge_loras(host, concepts, calibration=calibration, unmergeable="skip").lora

    wanted, exact, packed = (
        merged(offloads=offloads, packs=packs)
        for offloads, packs in ((None, False), (CPU, False), (CPU, True))
    )
    assert sum(moved[len(moved) // 2 :]) < 0.7 * sum(moved[: len(moved) // 2])
    for site, change in wanted.sites.items():
        assert torch.equal(exact.sites[site].dense(), change.dense())
        gap = (packed.sites[site].dense() - change.dense()).norm() / change.dense().norm()
        assert 0 < gap < 0.5, site


def test_rows_are_packed_before_any_is_left_out(monkeypatch):
    host, concepts = sd3()
    for module in (planner, strategies):
        monkeypatch.setattr(module, "is_apart", lambda device: True)
    monkeypatch.setattr(strategies, "PackedPlace", lambda place: PackedPlace(place, least=64))
    kept: list = []

    def recorded(footprints, limits, most):
        kept[:] = [list(footprints), limits, most]
        return plan_stage(footprints, limits, most)

    monkeypatch.setattr(planner, "plan_stage", recorded)
    calibration = Calibration(samples=8, timesteps=2, denoising_steps=2, latent_size=8, seed=3)
    preview_merge(host, concepts, calibration=calibration, memory_budget=3 << 20)
    footprints, _, most = kept
    assert [f.strategy.packs for f in footprints] == [False] * (len(footprints) - 1) + [True]
    *_, exact, packed = [f for f in footprints if f.parked is not None]
    assert packed.strategy.name == f"{exact.strategy.name}, at 8 bits"
    assert packed.parked.waiting < 0.6 * exact.parked.waiting
    rows = len(packed.stage.concept_ids)
    little = (exact.host_bytes(rows, 0) + packed.host_bytes(rows, 0)) // 2
    device = max(f.bytes_of(rows, 1, 0) for f in (exact, packed))
    with_packing, without = (
        plan_stage(some, MemoryLimits(device, little), most)
        for some in (footprints, footprints[:-1])
    )
    assert (with_packing.rows, with_packing.strategy) == (rows, packed.strategy)
    assert without.rows < rows
