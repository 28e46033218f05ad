"""A base that changed after its host was made, or that cannot wait, is refused."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny import random_lora

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.errors import IterisError
from iteris_core.hosts.diffusers import DiffusersHost

pytestmark = pytest.mark.usefixtures("unmeasured")


def merge(host, method: str = "iteris"):
    concepts = [Concept(random_lora(host, seed), prompts=["a dog"]) for seed in (1, 2)]
    calibration = Calibration(samples=2, timesteps=1, denoising_steps=1)
    return merge_loras(host, concepts, method, calibration=calibration)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_adapters_that_were_put_on_later_are_refused(host, component):
    lora = random_lora(host, 1)
    concepts = [Concept(lora, prompts=["a dog"])]
    targets = ["to_q"] if component == "unet" else ["q_proj"]
    config = LoraConfig(target_modules=targets)
    inject_adapter_in_model(config, getattr(host.pipeline, component))
    with pytest.raises(IterisError, match="has adapters loaded"):
        merge_loras(host, concepts)


def grouped(host, kind: str) -> None:
    from diffusers.hooks import apply_group_offloading

    more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    cpu = torch.device("cpu")
    apply_group_offloading(
        host.pipeline.unet, onload_device=cpu, offload_device=cpu, offload_type=kind, **more
    )


def test_offload_in_groups_of_blocks_is_refused(host):
    grouped(host, "block_level")
    with pytest.raises(IterisError, match=r'groups of blocks.*offload_type="leaf_level"'):
        merge(host)


def test_offload_layer_by_layer_is_taken(host):
    plain = merge(host).lora
    grouped(host, "leaf_level")
    found = merge(host).lora
    for site, change in plain.sites.items():
        assert torch.equal(change.up, found.sites[site].up)


def test_a_compiled_denoiser_is_called_so(pipeline):
    pipeline.unet = torch.compile(pipeline.unet)
    with pytest.raises(IterisError, match="UNet2DConditionModel is compiled"):
        DiffusersHost(pipeline)


def test_a_block_that_is_compiled_later_is_refused(host):
    host.pipeline.unet.mid_block.compile()
    with pytest.raises(IterisError, match="UNet2DConditionModel is compiled"):
        merge(host)
