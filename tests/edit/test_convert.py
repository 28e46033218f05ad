"""LoRAs with other tools' names, and other kinds as plain LoRAs."""

import json

import layouts
import pytest
import torch
from bases import make_lora, tiny_base, trained_sites
from command_line import make_world
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from iteris_core import IterisError, Lora, LowRank, write_lora
from iteris_core.edit.convert import comfyui_names, convert_lora, largest_error
from iteris_core.lora_files import base_model, read_lora_file


def lora_for(kind: str) -> Lora:
    """Exact in half precision, on what has a name in ComfyUI."""
    known = {piece.site for alias in comfyui_names(tiny_base(kind)).values() for piece in alias}
    sites = [site for site in trained_sites(kind) if site in known]
    return make_lora(kind, sites, dtype=torch.float16)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("names", ["kohya", "diffusers", "comfyui"])
def test_under_every_name_it_is_the_same_lora(kind, names, tmp_path):
    lora = lora_for(kind)
    if names == "kohya" and kind == "sd3":
        lora = make_lora(kind, [s for s in lora.sites if "text" not in s], dtype=torch.float16)
    path = convert_lora(lora, tmp_path / "out.safetensors", names)
    assert largest_error(lora, read_lora_file(path, tiny_base(kind))) < 1e-6
    if names != "comfyui":
        return
    known = layouts.original(lora, kind)[0]
    modules = {key.rsplit(".lora", 1)[0] for key in known if key.startswith("diffusion_model.")}
    written = {key.rsplit(".lora", 1)[0] for key in load_file(path)
               if key.startswith("diffusion_model.") and "lora" in key}  # fmt: skip
    assert written == modules


def test_names_that_nobody_knows_are_refused(tmp_path):
    known = tiny_base("sd1")
    unknown = base_model(type(known.architecture)("other", "Other"), known.shapes)
    lora = Lora({"unet.x": LowRank(torch.ones(2, 1), torch.ones(1, 2))}, base=unknown)
    with pytest.raises(IterisError, match="ComfyUI also reads diffusers' names"):
        convert_lora(lora, tmp_path / "out.safetensors", "comfyui")


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def test_the_command_keeps_type_metadata_and_words(world, iteris, host):
    source, out = world / "lora1.safetensors", world / "out.safetensors"
    lora = host.read_lora(source)
    metadata = {"modelspec.trigger_phrase": "s1 dog", "note": "kept"}
    write_lora(Lora(lora.sites, "one", metadata, base=lora.base), source, dtype="bfloat16",
               overwrite=True)  # fmt: skip
    words = ("convert", source, "-o", out, "--layout", "comfyui", "--base", world / "base")
    told = json.loads(iteris(*words, "--json"))
    assert told["dtype"] == "bfloat16"
    assert told["error"] < 1e-6
    with safe_open(out, "pt") as file:
        assert file.metadata().items() >= metadata.items()
    assert "exists already" in iteris.refused(*words)


def test_float8_becomes_float16_with_the_same_values(world, iteris):
    tensors = load_file(world / "lora1.safetensors")
    small = {k: t if t.ndim < 2 else t.to(torch.float8_e4m3fn) for k, t in tensors.items()}
    save_file(small, world / "small.safetensors")
    words = ("convert", world / "small.safetensors", "-o", world / "out.safetensors",
             "--base", world / "base", "--json")  # fmt: skip
    told = json.loads(iteris(*words))
    assert (told["dtype"], told["error"]) == ("float16", 0)
    assert told["notes"][-1].startswith("float8_e4m3fn becomes float16")


def test_a_loha_becomes_a_plain_lora(world, iteris, host):
    site = next(s for s in host.sites() if s.endswith("attn1.to_q"))
    width = host.sites()[site].weight.shape[0]
    torch.manual_seed(1)
    a1, b1, a2, b2 = (torch.randn(*s) for s in ((width, 2), (2, width)) * 2)
    name = "lora_unet_" + site.removeprefix("unet.").replace(".", "_")
    parts = {"w1_a": a1, "w1_b": b1, "w2_a": a2, "w2_b": b2}
    tensors = {f"{name}.hada_{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, world / "loha.safetensors")
    out = world / "plain.safetensors"
    text = iteris("convert", world / "loha.safetensors", "-o", out,
                          "--base", world / "base", "--dtype", "float32")  # fmt: skip
    assert "Read back" in text
    saved = load_file(out)
    up, down = (saved[f"{name}.lora_{part}.weight"] for part in ("up", "down"))
    scale = float(saved[f"{name}.alpha"]) / len(down)
    assert torch.allclose(up @ down * scale, (a1 @ b1) * (a2 @ b2), atol=1e-4)
