"""LoRAs with other tools' names, and other kinds as plain LoRAs."""

import json

import pytest
import torch
from command_line import make_world
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from iteris_core import Lora, write_lora


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def test_the_command_keeps_type_metadata_and_words(world, iteris, host):
    source, out = world / "lora1.safetensors", world / "out.safetensors"
    lora = host.read_lora(source)
    metadata = {"modelspec.trigger_phrase": "s1 dog", "note": "kept"}
    write_lora(Lora(lora.sites, "one", metadata, base=lora.base), source, dtype="bfloat16",
               overwrite=True)  # fmt: skip
    words = ("convert", source, "-o", out, "--layout", "peft", "--base", world / "base")
    told = json.loads(iteris(*words, "--json"))
    assert told["dtype"] == "bfloat16"
    changes = host.read_lora(out).sites
    assert changes.keys() == lora.sites.keys()
    assert all(
        torch.allclose(c.dense(), changes[s].dense(), atol=1e-2) for s, c in lora.sites.items()
    )
    with safe_open(out, "pt") as file:
        assert file.metadata().items() >= metadata.items()
    assert "exists already" in iteris.refused(*words)


def test_float8_becomes_float16_with_the_same_values(world, iteris, host):
    tensors = load_file(world / "lora1.safetensors")
    small = {k: t if t.ndim < 2 else t.to(torch.float8_e4m3fn) for k, t in tensors.items()}
    save_file(small, world / "small.safetensors")
    words = ("convert", world / "small.safetensors", "-o", world / "out.safetensors",
             "--base", world / "base", "--json")  # fmt: skip
    told = json.loads(iteris(*words))
    assert told["dtype"] == "float16"
    same = (
        host.read_lora(world / "small.safetensors").sites,
        host.read_lora(world / "out.safetensors").sites,
    )
    assert all(torch.equal(c.dense(), same[1][site].dense()) for site, c in same[0].items())
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
    iteris("convert", world / "loha.safetensors", "-o", out,
           "--base", world / "base", "--dtype", "float32")  # fmt: skip
    saved = load_file(out)
    up, down = (saved[f"{name}.lora_{part}.weight"] for part in ("up", "down"))
    scale = float(saved[f"{name}.alpha"]) / len(down)
    assert torch.allclose(up @ down * scale, (a1 @ b1) * (a2 @ b2), atol=1e-4)
