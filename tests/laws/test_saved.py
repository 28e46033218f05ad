"""A finished merge can be saved and is read back as it was, also if its LoRAs leave out the layers
that run first."""

from typing import get_args

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import is_attention, make_pipeline, random_lora

from iteris_core import Concept, DiffusersHost, Lora, LowRank, merge_loras
from iteris_core.lora_files import Layout

pytestmark = pytest.mark.usefixtures("unmeasured")
FEW = {"samples": 3, "timesteps": 1, "latents": "noise", "latent_size": 8}


def up_blocks(site: str) -> bool:
    """What B-LoRA trains, or the like of it."""
    return site.startswith("unet.up_blocks") and is_attention(site)


def cross_attention(site: str) -> bool:
    return ".attn2." in site


def text_encoder(site: str) -> bool:
    return site.startswith("text_encoder") and is_attention(site)


PAIRS = [(up_blocks, up_blocks), (cross_attention, cross_attention), (text_encoder, up_blocks)]
SETTINGS = [{"schedule": "jacobi"}, {"steps": 1}]


def merge(host, pair, settings):
    concepts = [
        Concept(random_lora(host, seed, select=select), trigger=f"sks{seed}", class_word="cat")
        for seed, select in enumerate(pair, 1)
    ]
    return merge_loras(host, concepts, settings=settings, calibration=FEW)


def assert_saved(host, result, folder):
    assert all(change.squared_norm() > 0 for change in result.lora.sites.values())
    assert result.report.sites.keys() == result.lora.sites.keys()
    for layout in get_args(Layout):
        path = result.save(folder / f"{layout}.safetensors", layout=layout, dtype="float32")
        again = host.read_lora(path)
        assert again.sites.keys() == result.lora.sites.keys()
        for site, change in result.lora.sites.items():
            torch.testing.assert_close(again.sites[site].dense(), change.dense())


def named(value):
    return str(value) if isinstance(value, dict) else " and ".join(some.__name__ for some in value)


@pytest.mark.parametrize(
    ("pair", "settings"),
    [*((pair, {}) for pair in PAIRS), *((PAIRS[0], some) for some in SETTINGS)],
    ids=named,
)
def test_a_merge_of_some_layers_is_saved_in_every_layout(pair, settings, tmp_path):
    host = DiffusersHost(make_pipeline())
    result = merge(host, pair, settings)
    assert host.streams(set(result.lora.sites)).keys() - result.lora.sites.keys()
    assert any(site.repair for site in result.report.sites.values())
    assert_saved(host, result, tmp_path)


@pytest.mark.slow
def test_so_is_one_at_real_widths(tmp_path):
    """There sites are solved in some directions alone, of which zero has none."""
    pipeline = make_pipeline()
    pipeline.unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(320, 320), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8,
    ).eval()  # fmt: skip
    host = DiffusersHost(pipeline)
    assert_saved(host, merge(host, PAIRS[0], {}), tmp_path)


def test_layers_that_a_lora_leaves_at_zero_are_none_of_its_layers(tmp_path):
    """As in an adapter that was made for more layers than were trained."""
    host = DiffusersHost(make_pipeline())
    pair = []
    for seed in (1, 2):
        sites = random_lora(host, seed, select=is_attention).sites
        zero = {s: LowRank(0 * c.up, c.down, c.kernel) for s, c in sites.items()}
        lora = Lora({s: c if up_blocks(s) else zero[s] for s, c in sites.items()}, f"lora-{seed}")
        pair.append(Concept(lora, trigger=f"sks{seed}", class_word="cat"))
    result = merge_loras(host, pair, calibration=FEW)
    whole = merge(host, (up_blocks, up_blocks), {})
    assert result.lora.sites.keys() == whole.lora.sites.keys()
    assert_saved(host, result, tmp_path)
