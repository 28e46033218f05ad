"""LoRAs added to checkpoints' weights: the changes, the names, and rounding."""

import layouts
import pytest
import torch
from bases import make_lora, tiny, tiny_base
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from iteris_core import IterisError, write_lora
from iteris_core.architectures.record import whole
from iteris_core.edit.bake import bake, places_in


def single_file(kind: str = "sd1") -> dict[str, torch.Tensor]:
    """A checkpoint of the tiny SD 1 under the original code's names, and what nobody looks at."""
    pipeline, found = tiny(kind), {"first_stage_model.x.weight": torch.ones(3, 3)}
    for key, value in pipeline.unet.state_dict().items():
        module, _, leaf = key.rpartition(".")
        if ".norm" not in key and "conv_norm" not in key:
            try:
                name = layouts.sgm_name(module, 1)
            except KeyError:
                continue
            found[f"model.diffusion_model.{name}.{leaf}"] = value
    for key, value in pipeline.text_encoder.state_dict().items():
        key = key if key.startswith("text_model.") else f"text_model.{key}"
        found[f"cond_stage_model.transformer.{key}"] = value
    return {key: value.clone().contiguous() for key, value in found.items()}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(single_file(), path, {"format": "pt", "title": "mine"})
    return path


@pytest.fixture
def lora(checkpoint):
    places = places_in(checkpoint, tiny_base("sd1"))
    placed = {piece.site for alias in places.values() for piece in alias}
    sites = [s for s in sorted(placed) if ".attn" in s or "self_attn" in s or ".ff." in s]
    assert len(sites) > 20
    return make_lora("sd1", sites, size=0.1), places


def test_names_stay_and_the_change_is_added(checkpoint, lora, tmp_path):
    lora, places = lora
    out = bake(checkpoint, tmp_path / "out.safetensors", lora.sites, places)
    before, after = load_file(checkpoint), load_file(out)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    by_site = {alias[0].site: key for key, alias in places.items()}
    assert changed == {by_site[site] for site in lora.sites}
    for site, change in lora.sites.items():
        difference = (after[by_site[site]] - before[by_site[site]]).flatten(1)
        assert torch.allclose(difference, change.dense(), atol=1e-6), site
    with safe_open(out, "pt") as file:
        assert file.metadata()["title"] == "mine"


def test_open_clip_has_q_k_and_v_in_one(tmp_path):
    base = tiny_base("sdxl")
    layer = "text_encoder_2.text_model.encoder.layers.0."
    width = base.shapes[f"{layer}self_attn.q_proj"][0]
    prefix = "conditioner.embedders.1.model.transformer.resblocks.0."
    fc1 = torch.zeros(base.shapes[f"{layer}mlp.fc1"])
    tensors = {f"{prefix}attn.in_proj_weight": torch.zeros(3 * width, width),
               f"{prefix}mlp.c_fc.weight": fc1}  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    places = places_in(tmp_path / "model.safetensors", base)
    into = torch.zeros(3 * width, width)
    for piece in places[f"{prefix}attn.in_proj_weight"]:
        piece.place(torch.full((width, width), float(1 + "qkv".index(piece.site[-6]))), into)
    assert into[:, 0].tolist() == [1.0] * width + [2.0] * width + [3.0] * width
    assert places[f"{prefix}mlp.c_fc.weight"] == whole(f"{layer}mlp.fc1", base.shapes)


def test_a_layer_without_a_place_is_named(checkpoint, lora, tmp_path):
    sites = {**lora[0].sites, "unet.nowhere": next(iter(lora[0].sites.values()))}
    with pytest.raises(IterisError, match=r"1 of \d+ layers .* such as unet\.nowhere"):
        bake(checkpoint, tmp_path / "out.safetensors", sites, lora[1])
    assert not (tmp_path / "out.safetensors").exists()


def test_quantised_files_are_refused(checkpoint, lora, tmp_path):
    lora, places = lora
    source = tmp_path / "scaled.safetensors"
    save_file({**load_file(checkpoint), "x.scale_weight": torch.ones(())}, source)
    with pytest.raises(IterisError, match="is already quantised"):
        bake(source, tmp_path / "out.safetensors", lora.sites, places)


def test_values_that_are_too_large_become_the_largest(checkpoint, lora, tmp_path):
    lora, places = lora
    (site, change), *_ = lora.sites.items()
    out = bake(checkpoint, tmp_path / "o.safetensors", {site: change.scaled(1e9)}, places,
               torch.float16)  # fmt: skip
    after = load_file(out)
    (key,) = (key for key, alias in places.items() if alias[0].site == site)
    assert float(after[key].float().abs().max()) == 65504
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}


def test_the_command(checkpoint, lora, tmp_path, iteris, monkeypatch):
    lora, places = lora
    monkeypatch.setattr("iteris_core.cli.files.released_base", lambda name: tiny_base("sd1"))
    file, out = write_lora(lora, tmp_path / "lora.safetensors"), tmp_path / "baked.safetensors"
    words = ["bake", checkpoint, "--lora", f"{file}:0.8/0.5", "-o", out]
    iteris(*words)
    before, after = load_file(checkpoint), load_file(out)
    for key, alias in places.items():
        if alias[0].site in lora.sites:
            strength = 0.5 if alias[0].site.startswith("text") else 0.8
            wanted = strength * lora.sites[alias[0].site].dense()
            assert torch.allclose((after[key] - before[key]).flatten(1), wanted, atol=1e-3)
    assert "exists already" in iteris.refused(*words)
    assert "fuse_lora" in iteris.refused("bake", tmp_path, "--lora", file, "-o", out)


def test_a_part_of_a_lora_counts_or_is_refused(checkpoint, lora, tmp_path, iteris, monkeypatch):
    lora, places = lora
    monkeypatch.setattr("iteris_core.cli.files.released_base", lambda name: tiny_base("sd1"))
    file, out = write_lora(lora, tmp_path / "lora.safetensors"), tmp_path / "baked.safetensors"
    iteris("bake", checkpoint, "--lora", f"{file},layers=*attn2*", "-o", out)
    before, after = load_file(checkpoint), load_file(out)
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    wanted = {key for key, alias in places.items()
              if "attn2" in alias[0].site and alias[0].site in lora.sites}  # fmt: skip
    assert changed == wanted != set()
    bake = ["bake", checkpoint, "-o", tmp_path / "none.safetensors", "--lora"]
    assert "are for two models; bake each file into the" in iteris.refused(*bake, f"{file}+{file}")
    for unused in ("weight=2", "kind=style", "always_on=include"):
        name = unused.partition("=")[0]
        told = iteris.refused(*bake, f"{file},{unused}")
        assert f"{name} does not count in iteris bake; leave it out" in told
    assert not (tmp_path / "none.safetensors").exists()


def test_in_a_plain_fp8_file_only_changed_layers_are_rounded(lora, tmp_path):
    source = tmp_path / "fp8.safetensors"
    save_file(
        {key: tensor.to(torch.float8_e4m3fn) for key, tensor in single_file().items()}, source
    )
    sites = dict(list(lora[0].sites.items())[:3])
    places = places_in(source, tiny_base("sd1"))
    changed = {key for key, alias in places.items() for p in alias if p.site in sites}
    out = bake(source, tmp_path / "out.safetensors", sites, places)
    before, after = load_file(source), load_file(out)
    for key, tensor in before.items():
        same = torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8))
        assert same == (key not in changed), key
