"""One record per architecture: a new one can be read, written and named without other changes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from bases import KINDS, tiny_base
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS
from safetensors.torch import save_file

from iteris_core import Concept, IterisError, Lora, LowRank, merge_loras, write_lora
from iteris_core.architectures import Architecture, architecture_of_sites
from iteris_core.architectures.row_mapping import fused, permuted
from iteris_core.hosts.diffusers_lora import single_file_pipeline
from iteris_core.lora_files import base_model, read_lora_file, read_tensors, to_tensors

BLOCK = "transformer.rings.0"


def names(shapes):
    sites = [f"{BLOCK}.to_{name}" for name in "qk"]
    return {"ring.0.qk": fused(sites, shapes)}


TOY = Architecture(
    "toy", "Toy", original_names=names, native=True, version="toy_v1", modelspec="toy-1"
)
SHAPES = {f"{BLOCK}.to_q": (6, 4), f"{BLOCK}.to_k": (8, 4)}


def test_a_new_architecture_is_read_and_written(tmp_path):
    toy = base_model(TOY, SHAPES)
    up, down = torch.randn(14, 2), torch.randn(2, 4)
    tensors = {"diffusion_model.ring.0.qk.lora_B.weight": up,
               "diffusion_model.ring.0.qk.lora_A.weight": down}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    lora = read_lora_file(tmp_path / "a.safetensors", toy)
    assert {site: c.shape for site, c in lora.sites.items()} == SHAPES
    merged = merge_loras(None, [Concept(lora)] * 2, "sum").lora
    path = write_lora(merged, tmp_path / "b.safetensors", dtype="float32")
    written, metadata = read_tensors(path)
    assert {key.partition(".")[0] for key in written} == {"lora_unet_ring_0_qk"}
    assert metadata["ss_base_model_version"] == "toy_v1"
    assert metadata["modelspec.architecture"] == "toy-1/lora"
    again = read_lora_file(path, toy)
    whole = torch.cat([again.sites[site].dense() for site in SHAPES])
    torch.testing.assert_close(whole, 2 * up @ down)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_recognised_by_its_sites(kind):
    assert architecture_of_sites(tiny_base(kind).shapes).name == kind


def test_rows_in_another_order():
    (piece,) = permuted("s", [4, 5, 0, 1, 2], start=3)
    assert piece.rows == ((4, 6), (0, 3))
    matrix, site = torch.randn(6, 2), torch.zeros(8, 2)
    site[3:] = piece.of_file(matrix)
    back = torch.zeros(6, 2)
    piece.place(site, back)
    assert torch.equal(back[[0, 1, 2, 4, 5]], matrix[[0, 1, 2, 4, 5]])


def lora_of_ranks(ranks, prefix="unet.") -> Lora:
    return Lora({f"{prefix}{name}": LowRank(torch.randn(9, rank), torch.randn(rank, 7))
                 for name, rank in ranks.items()})  # fmt: skip


def test_a_transformer_called_unet_keeps_its_ranks():
    """Alphas are made equal for diffusers' sake, which has UNets under that name and no DiT."""
    ranks = {"blocks.0.qkv": 15, "blocks.0.proj": 5, "blocks.0.mlp": 1}
    lora = lora_of_ranks(ranks)
    base = base_model(
        Architecture("any", "Any", denoiser="unet"), dict.fromkeys(lora.sites, (9, 7))
    )
    tensors, _ = to_tensors(dataclasses.replace(lora, base=base))
    found = {key.partition(".")[0]: len(t) for key, t in tensors.items() if "down" in key}
    assert found == {f"lora_unet_{name.replace('.', '_')}": rank for name, rank in ranks.items()}
    values = sum(t.numel() for key, t in tensors.items() if "alpha" not in key)
    assert values == sum(rank * (9 + 7) for rank in ranks.values())
    alphas = {float(t) for key, t in tensors.items() if key.endswith("alpha")}
    assert alphas == {15, 5, 1}
    of_sd, _ = to_tensors(lora)
    assert {float(t) for key, t in of_sd.items() if key.endswith("alpha")} == {15}


@pytest.mark.parametrize(("keys", "pipeline"), [
    ({"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (8,)},
     "StableDiffusionXLPipeline"),
    ({"double_blocks.0.img_attn.norm.key_norm.scale": (8,), "img_in.weight": (8, 64),
      "guidance_in.in_layer.bias": (8,)}, "FluxPipeline"),
    ({"joint_blocks.37.x_block.mlp.fc1.weight": (8, 8)}, "StableDiffusion3Pipeline"),
    ({"model.diffusion_model.out.2.bias": (4,)}, "StableDiffusionPipeline"),
])  # fmt: skip
def test_a_single_file_is_loaded_as_what_it_is(keys, pipeline, tmp_path):
    tensors = {key: torch.zeros(shape) for key, shape in keys.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert single_file_pipeline(tmp_path / "a.safetensors").__name__ == pipeline


@pytest.mark.parametrize(
    ("name", "loads"), [("StableDiffusionInpaintPipeline", True), ("DDPMPipeline", False)]
)
def test_a_single_file_of_another_kind_is_what_the_configuration_says(
    name, loads, tmp_path, monkeypatch
):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({key: torch.zeros(8, 9, 3, 3)}, tmp_path / "a.safetensors")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    released = {"pretrained_model_name_or_path": str(tmp_path)}
    monkeypatch.setitem(DIFFUSERS_DEFAULT_PIPELINE_PATHS, "inpainting", released)
    if loads:
        assert single_file_pipeline(tmp_path / "a.safetensors").__name__ == name
    else:
        with pytest.raises(IterisError, match="'inpainting', from which diffusers loads no"):
            single_file_pipeline(tmp_path / "a.safetensors")
