"""LoRAs added to checkpoints' weights: the changes, the names, and rounding."""

import copy

import layouts
import pytest
import torch
from bases import make_lora, tiny, tiny_base
from command_line import make_world
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from iteris_core import IterisError
from iteris_core.architectures.record import whole
from iteris_core.edit.bake import FP8, bake, places_in, rounded, scaled_fp8


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
    places, _ = places_in(checkpoint, tiny_base("sd1"))
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
    by_site = {alias[0].site: key for (_, key), alias in places.items()}
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
    places = {
        key: alias for (_, key), alias in places_in(tmp_path / "model.safetensors", base)[0].items()
    }
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


def test_fp8_with_scales_is_near_and_quantised_files_are_refused(checkpoint, lora, tmp_path):
    lora, places = lora
    exact = load_file(bake(checkpoint, tmp_path / "a.safetensors", lora.sites, places))
    out = bake(checkpoint, tmp_path / "b.safetensors", lora.sites, places, FP8)
    small = load_file(out)
    assert small["model.diffusion_model.scaled_fp8"].dtype == FP8
    scales = [key for key in small if key.endswith(".scale_weight")]
    assert len(scales) > 10
    for key in scales:
        name = key.replace(".scale_weight", ".weight")
        assert small[name].dtype == FP8
        error = (small[name].float() * small[key] - exact[name]).norm() / exact[name].norm()
        assert error < 0.04, name
    text = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    assert small[text].dtype == torch.float16
    with pytest.raises(IterisError, match="is already quantised"):
        bake(out, tmp_path / "c.safetensors", lora.sites, places_in(out, tiny_base("sd1"))[0])


def test_values_that_are_too_large_become_the_largest():
    values = torch.tensor([0.1, -1e6])
    assert rounded(values, torch.float16).tolist() == [float(values[0].half()), -65504]


def test_the_scale_uses_the_whole_range():
    stored, scale = scaled_fp8(torch.tensor([[0.5, -2.0]]))
    assert stored.float().abs().max() == torch.finfo(FP8).max
    assert float(scale) == pytest.approx(2 / 448)


def test_a_folder_draws_as_with_the_loras_loaded(tmp_path, iteris):
    from diffusers import StableDiffusionPipeline

    world = make_world(tmp_path)
    out = world / "baked"
    words = ["bake", world / "base", "--lora", f"{world}/lora1.safetensors:0.8/0.5",
             "--lora", world / "lora2.safetensors", "-o", out]  # fmt: skip
    iteris(*words)
    baked = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    loaded = StableDiffusionPipeline.from_pretrained(world / "base", safety_checker=None)
    base = copy.deepcopy(loaded.unet)
    for number in (1, 2):
        loaded.load_lora_weights(world / f"lora{number}.safetensors", adapter_name=f"a{number}")
    loaded.set_adapters(["a1", "a2"], [{"unet": 0.8, "text_encoder": 0.5}, 1.0])
    tokens = torch.arange(1, 13)[None]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        words_of = [p.text_encoder(tokens).last_hidden_state for p in (baked, loaded)]
        assert torch.allclose(*words_of, atol=1e-3)
        one, two, plain = (
            unet(noise, 300, words_of[0]).sample for unet in (baked.unet, loaded.unet, base)
        )
    assert (one - two).norm() < 1e-3 * (plain - two).norm()
    assert "exists already" in iteris.refused(*words)


def test_both_variants_of_a_model_get_the_change(tmp_path, iteris):
    world = make_world(tmp_path)
    unet = world / "base/unet"
    full = load_file(unet / "diffusion_pytorch_model.safetensors")
    half = {key: tensor.half() for key, tensor in full.items()}
    save_file(half, unet / "diffusion_pytorch_model.fp16.safetensors")
    out = world / "baked"
    lora = world / "lora1.safetensors"
    iteris("bake", world / "base", "--lora", lora, "-o", out)
    one, two = (load_file(out / f"unet/diffusion_pytorch_model{variant}.safetensors")
                for variant in ("", ".fp16"))  # fmt: skip
    changed = [key for key in full if not torch.equal(one[key], full[key])]
    assert changed
    for key, tensor in two.items():
        assert tensor.dtype == torch.float16
        assert torch.allclose(tensor.float(), one[key], atol=2e-3), key
        assert torch.equal(tensor, half[key]) == (key not in changed), key


def test_in_a_plain_fp8_file_only_changed_layers_are_rounded(lora, tmp_path):
    source = tmp_path / "fp8.safetensors"
    save_file({key: tensor.to(FP8) for key, tensor in single_file().items()}, source)
    sites = dict(list(lora[0].sites.items())[:3])
    places, _ = places_in(source, tiny_base("sd1"))
    changed = {key for (_, key), alias in places.items() for p in alias if p.site in sites}
    out = bake(source, tmp_path / "out.safetensors", sites, places)
    before, after = load_file(source), load_file(out)
    for key, tensor in before.items():
        same = torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8))
        assert same == (key not in changed), key
        scale = f"{key.removesuffix('.weight')}.scale_weight"
        if key not in changed and scale in after:
            assert float(after[scale]) == 1, key
