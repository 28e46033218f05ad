"""Names of files in ComfyUI: every alias of its key maps is read, and the names that are written
are in the stock loader's, also where sd-scripts has none."""

import random

import pytest
import reduced_models
import torch
from kit import part
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = "blocks.0."
ENCODER = "text_encoders.umt5xxl.transformer.encoder.block.0.layer."
WAN = {
    f"diffusion_model.{BLOCK}self_attn.q": (96, 96),
    f"diffusion_model.{BLOCK}cross_attn.k": (96, 96),
    f"diffusion_model.{BLOCK}ffn.2": (96, 128),
    f"{ENCODER}0.SelfAttention.q": (64, 64),
    f"{ENCODER}1.DenseReluDense.wo": (64, 64),
}


def added(model, clip, key):
    """What the patches on a MODEL and CLIP add to a weight."""
    import comfy.lora

    patcher = model if key.startswith("diffusion_model.") else clip.patcher
    (weight, _), *patches = patcher.get_key_patches(key)[key]
    base = weight.detach().float().clone()
    moved = comfy.lora.calculate_weight(patches, base.clone(), key)
    return (moved - base).flatten(1).detach()


def any_names(sites, stock, draw):
    """For every site one of the names that ComfyUI has for it, or one of each of its parts: name →
    weight key, and how many rows of it."""
    names: dict[str, dict[tuple[int, int], list[str]]] = {key: {} for key in sites.names}
    for name, target in stock.items():
        key, place, *_ = (target, None) if isinstance(target, str) else target
        if key in names and name in sites.base.aliases:
            rows = sites.modules[sites.names[key]].weight.shape[0]
            _, start, length = place or (0, 0, rows)
            names[key].setdefault((start, length), []).append(name)
    found: dict[str, tuple[str, int]] = {}
    for key, of_places in names.items():
        rows = sites.modules[sites.names[key]].weight.shape[0]
        places = [(0, rows)]
        if len(of_places) > 1 and draw.random() < 0.5:
            # The smallest parts: some names are of several of them.
            places, done = [], 0
            for start, length in sorted(of_places):
                if start == done:
                    places.append((start, length))
                    done += length
        found |= {draw.choice(of_places[place]): (key, place[1]) for place in places}
    return found


@pytest.mark.parametrize("kind", reduced_models.ARCHITECTURES)
def test_any_name_of_any_class(pack, tmp_path, kind):
    """What our reader takes from a file, and what our writer puts into one, is what the stock
    loader adds to every weight."""
    import comfy.lora

    comfy_lora, files = part(pack, "nodes.comfy_lora"), part(pack, "iteris_core.lora_files")
    model, clip = reduced_models.ARCHITECTURES[kind].make()
    sites = comfy_lora.ComfySites(model, clip)
    stock = comfy.lora.model_lora_keys_clip(
        clip.cond_stage_model, comfy.lora.model_lora_keys_unet(model.model, {})
    )
    named = any_names(sites, stock, random.Random(0))
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, (key, out) in named.items():
        _, *rest = sites.modules[sites.names[key]].weight.shape
        tensors[f"{name}.lora_up.weight"] = torch.randn(
            out, 2, *[1] * len(rest[1:]), generator=generator
        )
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, *rest, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "a.safetensors")
    lora = sites.read_lora(tmp_path / "a.safetensors")
    assert set(lora.sites) == set(sites.modules)
    written, _ = files.to_tensors(lora, dtype="float32")
    for some in (tensors, written):
        loaded = comfy.lora.load_lora(some, stock)
        patched = model.clone(), clip.clone()
        assert {*patched[0].add_patches(loaded), *patched[1].add_patches(loaded)} == set(loaded)
        for key, site in sites.names.items():
            theirs = added(*patched, key)
            assert float((lora.sites[site].dense() - theirs).norm() / theirs.norm()) < 1e-4, site


@pytest.mark.parametrize("name", ["linear1", "linear1_qkv", "to_q"])
def test_slices_of_a_fused_weight(pack, tmp_path, name):
    """FLUX's linear1 in whole, without the MLP, and one of its parts: the change, the DoRA and the
    full difference are those that ComfyUI adds."""
    import comfy.lora

    model, clip = reduced_models.flux()
    comfy_lora, files = part(pack, "nodes.comfy_lora"), part(pack, "iteris_core.lora_files")
    sites = comfy_lora.ComfySites(model, clip)
    rows = {"linear1": 448, "linear1_qkv": 192, "to_q": 64}[name]
    root = "diffusion_model.single_blocks.0."
    module = {"to_q": "transformer.single_transformer_blocks.0.attn.to_q"}.get(name, root + name)
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(rows, 3, generator=draw), torch.randn(3, 64, generator=draw)
    factors = {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
    magnitude = 1 + torch.rand(1, 64, generator=draw)  # by inputs, where ComfyUI has it as we do
    for tensors in (
        factors | {f"{module}.alpha": torch.tensor(2.0)},
        factors | {f"{module}.dora_scale": magnitude},
        {f"{module}.diff": up @ down},
    ):
        save_file(tensors, tmp_path / "a.safetensors")
        lora = sites.read_lora(tmp_path / "a.safetensors", files.ReadOptions(energy=1.0))
        ((site, change),) = lora.sites.items()
        patched = model.clone()
        loaded = comfy.lora.load_lora(tensors, sites.key_map)
        assert patched.add_patches(loaded)
        key = next(key for key, named in sites.names.items() if named == site)
        theirs = added(patched, clip, key)
        assert float((change.dense() - theirs).norm() / theirs.norm()) < 1e-5


def test_weights_that_no_lora_is_of(pack, tmp_path):
    """A name that ComfyUI has, of a normalisation and of a 3D convolution: refused with file, key
    and weight, or left out where that is asked for."""
    core, files = part(pack, "iteris_core"), part(pack, "iteris_core.lora_files")
    model, clip = reduced_models.wan()
    sites = part(pack, "nodes.comfy_lora").ComfySites(model, clip)
    path = reduced_models.write_lora(tmp_path / "a.safetensors", WAN, 1)
    tensors = load_file(path)
    for name, shape in (
        ("blocks.0.self_attn.norm_q", (96,)),
        ("patch_embedding", (96, 16, 1, 2, 2)),
    ):
        key = f"diffusion_model.{name}.diff"
        save_file({**tensors, key: torch.ones(shape)}, path)
        with pytest.raises(core.LoraFileError, match=rf"a\.safetensors: {key} changes .*{name}"):
            sites.read_lora(path)
        lora = sites.read_lora(path, files.ReadOptions(allow_partial=True))
        assert len(lora.sites) == len(WAN)
        assert key in lora.notes[0]
