"""One record per architecture: once recognised, one can be read, written and named by it alone."""

import pytest
import torch
from bases import KINDS, tiny_base
from safetensors.torch import save_file

from iteris_core import Concept, Lora, LowRank, merge_loras, write_lora
from iteris_core.architectures import Architecture, architecture_of_sites
from iteris_core.architectures.record import fused
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


def test_a_transformer_called_unet_keeps_its_ranks():
    """Alphas are made equal for diffusers' sake, which has UNets under that name and no DiT."""
    ranks = {"blocks.0.qkv": 15, "blocks.0.proj": 5, "blocks.0.mlp": 1}
    sites = {f"unet.{n}": LowRank(torch.randn(9, r), torch.randn(r, 7)) for n, r in ranks.items()}
    base = base_model(Architecture("any", "Any", denoiser="unet"), dict.fromkeys(sites, (9, 7)))
    tensors, _ = to_tensors(Lora(sites, base=base))
    found = {key.partition(".")[0]: len(t) for key, t in tensors.items() if "down" in key}
    assert found == {f"lora_unet_{n.replace('.', '_')}": rank for n, rank in ranks.items()}
    for lora, alphas in ((Lora(sites, base=base), {15, 5, 1}), (Lora(sites), {15})):
        tensors, _ = to_tensors(lora)
        assert {float(t) for key, t in tensors.items() if key.endswith("alpha")} == alphas


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
