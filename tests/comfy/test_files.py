"""Our files in stock ComfyUI: every key is read, and changes and outputs are those of diffusers."""

import logging

import pytest
import torch
from reduced_models.parts import taken_apart
from released_models import CONFIGS, diffusers_names, released
from safetensors.torch import load_file
from torch import Tensor

from iteris_core import Lora, LowRank, write_lora
from iteris_core.lora_files import read_lora_file, released_base


def trained(site):
    """What LoRAs change: attention, feed-forward, resnets, modulation; not the embeddings."""
    if site.startswith("text"):
        parts = (".self_attn.", ".mlp.", "SelfAttention", "DenseReluDense")
    else:
        parts = (".attentions.", ".resnets.", "samplers.", "transformer_blocks.", "norm_out",
                 "transformer.proj_out")  # fmt: skip
    return any(part in site for part in parts)


def random_lora(base, sites, rank):
    generator = torch.Generator().manual_seed(0)
    changes: dict[str, LowRank] = {}
    for site in sites:
        out, *rest = base.shapes[site]
        width = torch.Size(rest).numel()
        up = torch.randn(out, rank, generator=generator) / 8
        down = torch.randn(rank, width, generator=generator) / width**0.5
        changes[site] = LowRank(up, down, tuple(rest[1:]) or None)
    return Lora(changes, base=base)


# -- released models, without their weights -------------------------------------------------------


def patches_of(kind, path, caplog):
    """The weights' shapes, and the patches that Load LoRA makes of a file, of which it leaves no
    key."""
    import comfy.lora
    import comfy.lora_convert

    model, clip = released(kind)
    key_map = comfy.lora.model_lora_keys_unet(model, {})
    key_map = comfy.lora.model_lora_keys_clip(clip, key_map)
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(load_file(path)), key_map)
    assert "not loaded" not in caplog.text
    return {k: v.shape for m in (model, clip) for k, v in m.state_dict().items()}, patches


BLOCKS = {
    "sd1": ("down_blocks.1.", "up_blocks.3.2.", "mid_block.resnets.1."),
    "sdxl": ("up_blocks.2.", "down_blocks.1.attentions.1.", "mid_block.resnets.0."),
    "sd3": (".transformer_blocks.0.", ".transformer_blocks.23."),
    "flux": ("r.transformer_blocks.18.attn", ".single_transformer_blocks.37.", "k.18.norm"),
}
"""One block of every kind: ΔW of a whole model would not fit into memory."""


@pytest.mark.parametrize("kind", CONFIGS)
def test_changes_are_the_same_site_by_site(library, tmp_path, caplog, kind):
    base = released_base(kind)
    sites = [site for site in base.shapes if trained(site)]
    chosen = [s for s in sites if s.startswith("text") and (".layers.1." in s or ".block.1." in s)]
    chosen += [s for s in sites if any(f".{block}" in s or block in s for block in BLOCKS[kind])]
    chosen += [s for s in sites if "norm_out" in s or s == "transformer.proj_out"]
    lora = random_lora(base, dict.fromkeys(chosen), 2)
    path = write_lora(lora, tmp_path / "a.safetensors", dtype="float32")
    shapes, patches = patches_of(kind, path, caplog)
    found = diffusers_names(kind, changes_of(patches, shapes))
    again = read_lora_file(path, base)
    assert set(again.sites) == set(lora.sites)
    for site, change in again.sites.items():
        x = torch.randn(change.shape[1], 3, generator=torch.Generator().manual_seed(0))
        ours, theirs = change.up @ (change.down @ x), found.pop(site).flatten(1) @ x
        assert float((theirs - ours).norm() / ours.norm()) < 1e-4, site
    # Rows of a fused weight that no site of ours changes are there too, as zeros.
    assert not any(bool(delta.any()) for delta in found.values())


def changes_of(patches, shapes):
    """Weight → what the patches add to it, in whole or in parts."""
    found: dict[str, Tensor] = {}
    for target, patch in patches.items():
        key, offset, function = taken_apart(target)
        whole = found.setdefault(key, torch.zeros(shapes[key]))
        into = whole if offset is None else whole.narrow(*offset)
        zero = torch.zeros(into.shape)
        into += patch.calculate_weight(zero, key, 1.0, 1.0, None, function or (lambda a: a))
    return found


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3"])
def test_every_key_of_a_whole_model_is_taken(library, tmp_path, caplog, kind):
    base = released_base(kind)
    sites = [site for site in base.shapes if trained(site)]
    path = write_lora(random_lora(base, sites, 1), tmp_path / "a.safetensors")
    _, patches = patches_of(kind, path, caplog)
    # A patch is of a whole weight of ComfyUI's, of which ours are fused pieces in SD 3.
    assert 3 * len(patches) == len(load_file(path))
    assert kind == "sd3" or len(patches) == len(sites)
