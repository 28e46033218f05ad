"""Names of files in ComfyUI: every alias of its key maps is read, and the names that are written
are in the stock loader's, also where sd-scripts has none."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import reduced_models
import torch
from safetensors.torch import save_file
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


def part(pack: ModuleType, name: str) -> Any:
    return importlib.import_module(f"{pack.__name__}.{name}")


def added(model: Any, clip: Any, key: str) -> Tensor:
    """What the patches on a MODEL and CLIP add to a weight."""
    import comfy.lora

    patcher = model if key.startswith("diffusion_model.") else clip.patcher
    (weight, _), *patches = patcher.get_key_patches(key)[key]
    base = weight.detach().float().clone()
    moved = comfy.lora.calculate_weight(patches, base.clone(), key)
    return (moved - base).flatten(1).detach()


def test_an_encoder_without_kohya_names(pack: ModuleType, tmp_path: Path) -> None:
    """UMT5, which the stock key map has under ComfyUI's generic names only."""
    core, comfy_lora = part(pack, "iteris_core"), part(pack, "nodes.comfy_lora")
    files = part(pack, "iteris_core.lora_files")
    model, clip = reduced_models.wan()
    sites = comfy_lora.ComfySites(model, clip)
    path = reduced_models.write_lora(tmp_path / "a.safetensors", WAN, 1)
    lora = sites.read_lora(path)
    assert len(lora.sites) == len(WAN)
    assert lora.notes == []
    result = core.merge_loras(None, [core.Concept(lora), core.Concept(lora)], "sum")
    tensors, metadata = files.to_tensors(result.lora, dtype="float32")
    assert "ss_base_model_version" not in metadata
    names = {key.partition(".lora_")[0].removesuffix(".alpha") for key in tensors}
    assert {n for n in names if not n.startswith("lora_unet_")} == {n for n in WAN if "umt5" in n}
    with torch.inference_mode():
        patched = comfy_lora.apply_lora(model, clip, tensors)
    for key, site in sites.names.items():
        if site in lora.sites:
            expected = 2 * lora.sites[site].dense()
            torch.testing.assert_close(added(*patched, key), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["linear1", "linear1_qkv", "to_q"])
def test_slices_of_a_fused_weight(pack: ModuleType, tmp_path: Path, name: str) -> None:
    """FLUX's linear1 in whole, without the MLP, and one of its parts: the change, the DoRA and the
    full difference are those that ComfyUI adds."""
    import comfy.lora

    model, clip = reduced_models.flux()
    comfy_lora, files = part(pack, "nodes.comfy_lora"), part(pack, "iteris_core.lora_files")
    sites = comfy_lora.ComfySites(model, clip)
    rows = {"linear1": 448, "linear1_qkv": 192, "to_q": 64}[name]
    module = {
        "linear1": "diffusion_model.single_blocks.0.linear1",
        "linear1_qkv": "diffusion_model.single_blocks.0.linear1_qkv",
        "to_q": "transformer.single_transformer_blocks.0.attn.to_q",
    }[name]
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


def test_parts_of_a_fused_weight_keep_their_ranks(pack: ModuleType, tmp_path: Path) -> None:
    """q, k and v of FLUX are one site of the sum of their ranks; nothing else grows with it."""
    files, comfy_lora = part(pack, "iteris_core.lora_files"), part(pack, "nodes.comfy_lora")
    sites = comfy_lora.ComfySites(*reduced_models.flux())
    block = "transformer.transformer_blocks.0."
    names = {f"{block}attn.to_{n}": (64, 64) for n in "qkv"} | {f"{block}ff.net.2": (64, 256)}
    path = reduced_models.write_lora(tmp_path / "a.safetensors", names, 1, rank=5)
    lora = sites.read_lora(path)
    tensors, _ = files.to_tensors(lora)
    ranks = {key.partition(".lora_down")[0]: len(t) for key, t in tensors.items() if "down" in key}
    assert ranks == {
        "lora_unet_double_blocks_0_img_attn_qkv": 15,
        "lora_unet_double_blocks_0_img_mlp_2": 5,
    }


def test_swaps_columns_and_unknown_functions(pack: ModuleType) -> None:
    comfy_lora = part(pack, "nodes.comfy_lora")
    shapes = {"s": (6, 4)}

    def swap(weight: Tensor) -> Tensor:
        shift, scale = weight.chunk(2, dim=0)
        return torch.cat([scale, shift])

    ((piece),) = comfy_lora._alias("s", shapes, ("s.weight", None, swap))
    matrix = torch.randn(6, 4)
    assert torch.equal(piece.of_file(matrix), swap(matrix))
    ((piece),) = comfy_lora._alias("s", shapes, ("s.weight", (0, 2, 4), swap))
    assert (piece.start, piece.length) == (2, 4)
    assert torch.equal(piece.of_file(matrix[:4]), swap(matrix[:4]))
    assert "columns 1 to 3" in comfy_lora._alias("s", shapes, ("s.weight", (1, 1, 2)))
    for function in (lambda w: w * 2, lambda w: w[:, :2] @ w, lambda w: w[:3]):
        assert "function" in comfy_lora._alias("s", shapes, ("s.weight", None, function))
