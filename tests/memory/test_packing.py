"""Packing of waiting data into 8 or 4 bits, and a merge that uses it."""

import copy

import pytest
import torch
from bases import make_lora, tiny
from forced_plans import CPU, planned_as

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.activations import host_pool
from iteris_core.activations.host_pool import pack, unpack
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.passes import sweep

pytestmark = pytest.mark.usefixtures("unmeasured")


def there_and_back(values: torch.Tensor, bits: int) -> torch.Tensor:
    packed, found = pack(values, bits), torch.empty_like(values)
    assert len(packed) == -(-len(values) // 32) * (4 * bits + 2)
    unpack(packed, found, bits)
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3 * 128 + 5])
def test_a_value_is_off_by_half_a_step_of_its_group_at_most(bits, dtype, count):
    torch.manual_seed(0)
    values = (torch.randn(count) * torch.logspace(-6, 3, count)).to(dtype)
    found = there_and_back(values, bits)
    padded = torch.nn.functional.pad(values.double(), (0, -count % 32))
    step = padded.view(-1, 32).abs().amax(1) / (2 ** (bits - 1) - 1)
    step = step.repeat_interleave(32)[:count]
    rounding = values.double().abs() * torch.finfo(torch.bfloat16).eps + torch.finfo(dtype).tiny
    assert ((found.double() - values.double()).abs() <= 0.51 * step + rounding).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_and_infinities(bits):
    values = torch.tensor([*[0.0] * 33, -torch.inf, torch.inf], dtype=torch.bfloat16)
    found = there_and_back(values, bits)
    assert not found[:-2].any()
    most = torch.finfo(torch.bfloat16).max
    assert found[-2:].tolist() == pytest.approx([-most, most], rel=1e-2)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.5), pytest.param(4, 0.8, marks=pytest.mark.slow)])
def test_a_merge_with_rows_at_few_bits_is_nearly_the_same(monkeypatch, bits, most):
    host = DiffusersHost(copy.deepcopy(tiny("sd3")).to(torch.bfloat16))
    sites = tuple(site for site in host.sites() if site.startswith("transformer."))
    loras = (make_lora("sd3", sites, seed) for seed in (1, 2))
    concepts = [Concept(lora, trigger=f"s{n}", class_word="dog") for n, lora in enumerate(loras)]
    monkeypatch.setattr(host_pool, "_LEAST_PACKED", 64)

    def merged(bits):
        monkeypatch.setattr(sweep, "planned", planned_as(8, CPU, bits=bits))
        calibration = Calibration(samples=4, timesteps=2, denoising_steps=2, latent_size=8, seed=3)
        return merge_loras(host, concepts, calibration=calibration, unmergeable="skip").lora

    wanted, packed = merged(None), merged(bits)
    gaps = [
        float((packed.sites[site].dense() - change.dense()).norm() / change.dense().norm())
        for site, change in wanted.sites.items()
    ]
    assert 0 < max(gaps) < most
