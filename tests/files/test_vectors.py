"""Changes of biases and normalisations in files: every layout, fused modules, what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from bases import make_lora, tiny_base, trained_sites
from safetensors.torch import load_file, save_file

from iteris_core import IterisError, write_lora
from iteris_core.edit.convert import convert_lora, largest_error
from iteris_core.lora_files import ReadOptions, read_lora_file

WITH = ReadOptions(vectors=True)


def with_vectors(kind):
    """A LoRA with a change of every parameter that the layout has a place for."""
    base, generator = tiny_base(kind), torch.Generator().manual_seed(4)
    sizes = {p.site: p.start + p.length for alias in base.vectors.values() for p in alias}
    lora = make_lora(kind, [s for s in trained_sites(kind) if "text" not in s], dtype=torch.float16)
    vectors = {
        name: torch.randn(size, generator=generator).half().float() for name, size in sizes.items()
    }
    return replace(lora, vectors=vectors)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("names", ["kohya", "comfyui"])
def test_they_come_back_as_they_were(kind, names, tmp_path):
    lora = with_vectors(kind)
    path = convert_lora(lora, tmp_path / "out.safetensors", names)
    back = read_lora_file(path, tiny_base(kind), options=WITH)
    assert back.vectors.keys() == lora.vectors.keys()
    assert largest_error(lora, back) < 1e-6
    assert any(name.endswith("norm1.weight") or "attn" in name for name in lora.vectors)


def test_fused_biases_stand_one_after_the_other(tmp_path):
    """q, k and v of FLUX are one layer of the original, and so are their biases."""
    lora = with_vectors("flux")
    stored = load_file(write_lora(lora, tmp_path / "out.safetensors", dtype="float32"))
    block = "transformer.transformer_blocks.0.attn"
    parts = [lora.vectors[f"{block}.to_{part}.bias"] for part in "qkv"]
    found = stored["lora_unet_double_blocks_0_img_attn_qkv.diff_b"]
    assert torch.equal(found, torch.cat(parts))


def test_a_merge_refuses_them_and_other_shapes_are_errors(tmp_path):
    path = write_lora(with_vectors("sd1"), tmp_path / "out.safetensors")
    with pytest.raises(IterisError, match=r"a change of a bias|matches no module"):
        read_lora_file(path, tiny_base("sd1"))
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(".diff_b"))
    save_file({**tensors, key: torch.ones(3)}, path)
    with pytest.raises(IterisError, match=rf"{key} is \(3,\)"):
        read_lora_file(path, tiny_base("sd1"), options=WITH)


def test_a_value_that_half_precision_does_not_hold_is_refused(tmp_path):
    lora = with_vectors("sd1")
    name = min(lora.vectors)
    lora = replace(lora, vectors={**lora.vectors, name: 1e6 * torch.ones_like(lora.vectors[name])})
    with pytest.raises(IterisError, match="too large for"):
        write_lora(lora, tmp_path / "out.safetensors")


def test_a_file_that_is_resized_keeps_them(tmp_path, iteris):
    lora = with_vectors("sd1")
    path, out = write_lora(lora, tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    text = iteris("resize", path, "-o", out, "--rank", 2, "--json")
    assert max(json.loads(text)["ranks"].values()) >= 2
    before, after = load_file(path), load_file(out)
    kept = {key for key in before if key.endswith((".diff", ".diff_b"))}
    assert kept
    assert all(torch.equal(before[key], after[key]) for key in kept)
