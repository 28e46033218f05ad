"""LoRA files in layouts that only the pipelines' own loaders know."""

import functools

import pytest
import torch
from loader_layouts import ATTENTION, LAYOUTS, WAN, Z_IMAGE, fused, loaded_changes, renamed
from pipelines import PIPELINES, lora_tensors
from safetensors.torch import save_file

from iteris_core.architectures import ARCHITECTURES
from iteris_core.errors import IterisError, LoraFileError
from iteris_core.hosts.diffusers_lora import base_of, pipeline_sites, read_lora
from iteris_core.lora_files import ReadOptions, write_lora

OTHERS = [n for n in PIPELINES if not n.startswith(("SD", "FLUX.1", "InstructPix2Pix"))]
"""Pipelines that no record of ours is for."""
FAST = {name for name, _ in LAYOUTS.values()} | {"SDXL", "SD 3", "FLUX.1", "Mochi"}


def fast_first(names):
    """Those that are not needed here otherwise are slow tests."""
    slow = pytest.mark.slow
    return [name if name in FAST else pytest.param(name, marks=slow) for name in names]


@functools.cache
def pipeline_of(name: str):
    return PIPELINES[name]().pipeline


def read(pipeline, tensors, tmp_path, **options):
    path = tmp_path / "lora.safetensors"
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)
    return read_lora(pipeline, pipeline_sites(pipeline), path, ReadOptions(**options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_changes_are_those_that_the_loader_makes(layout, tmp_path):
    name, named = LAYOUTS[layout]
    pipeline = pipeline_of(name)
    tensors = named(lora_tensors(pipeline))
    ours = read(pipeline, tensors, tmp_path).sites
    theirs = loaded_changes(pipeline, str(tmp_path / "lora.safetensors"))
    assert set(ours) == set(theirs)
    for site, change in theirs.items():
        assert torch.allclose(ours[site].dense(), change, rtol=1e-5, atol=1e-6), site


def test_a_spelling_that_the_loader_lacks_is_read_as_one_that_it_has(tmp_path):
    """ComfyUI's fused Z-Image attention, which diffusers splits under kohya's names alone."""
    pipeline = pipeline_of("Z-Image")
    tensors = fused(lora_tensors(pipeline), *ATTENTION)
    ours = read(pipeline, renamed(tensors, *Z_IMAGE), tmp_path).sites
    for key in tensors:
        if ".qkv.lora_B" in key:
            down, up = tensors[key.replace("lora_B", "lora_A")], tensors[key]
            for part, rows in zip("qkv", (up @ down).chunk(3), strict=True):
                site = key.partition(".qkv.")[0] + f".to_{part}"
                assert torch.allclose(ours[site].dense(), rows, atol=1e-6)


def test_what_the_loader_leaves_out_is_named(tmp_path):
    name, named = LAYOUTS["FLUX.2, kohya"]
    pipeline = pipeline_of(name)
    tensors = named(lora_tensors(pipeline))
    whole = read(pipeline, tensors, tmp_path)
    more = {f"lora_unet_guidance_in_in_layer.lora_{end}.weight": torch.ones(shape)
            for end, shape in (("down", (2, 16)), ("up", (32, 2)))}  # fmt: skip
    with pytest.raises(LoraFileError, match=r"leave out 2 of .* lora_unet_guidance_in_in_layer"):
        read(pipeline, tensors | more, tmp_path)
    partial = read(pipeline, tensors | more, tmp_path, allow_partial=True)
    assert set(partial.sites) == set(whole.sites)
    (note,) = [note for note in partial.notes if "guidance_in_in_layer" in note]
    assert note.startswith("left out: 2 tensors, such as")
    zeros = {key: torch.zeros_like(tensor) for key, tensor in more.items()}
    assert set(read(pipeline, tensors | zeros, tmp_path).sites) == set(whole.sites)


def test_a_dora_that_the_loader_strips_is_not_read_as_another_change(tmp_path):
    pipeline = pipeline_of("Wan")
    tensors = renamed(lora_tensors(pipeline), *WAN)
    scales = {"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(32, 1)}
    with pytest.raises(
        LoraFileError, match=r"does not convert the file .*self_attn\.q\.dora_scale"
    ):
        read(pipeline, tensors | scales, tmp_path)


def test_text_encoders_that_the_loader_does_not_read_are_refused(tmp_path):
    pipeline = pipeline_of("Wan")
    name = "text_encoder.encoder.block.0.layer.0.SelfAttention.q"
    text = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    tensors = lora_tensors(pipeline)
    with pytest.raises(LoraFileError, match=f"WanPipeline would leave out 2 of .*{name}"):
        read(pipeline, tensors | text, tmp_path)
    partial = read(pipeline, tensors | text, tmp_path, allow_partial=True)
    assert all(site.startswith("transformer.") for site in partial.sites)
    assert any(name in note for note in partial.notes)


def test_a_file_for_another_model_is_refused(tmp_path):
    pipeline = pipeline_of("Wan")
    tensors = renamed(lora_tensors(pipeline_of("LTX-Video")))
    with pytest.raises(LoraFileError, match="another base model"):
        read(pipeline, tensors, tmp_path)


def test_a_layout_without_names_is_refused_with_the_one_that_has_some(tmp_path):
    pipeline = pipeline_of("Wan")
    lora = read(pipeline, lora_tensors(pipeline), tmp_path)
    with pytest.raises(IterisError, match=r'no name in kohya layout.*write layout="peft"'):
        write_lora(lora, tmp_path / "b.safetensors", layout="kohya")


@pytest.mark.parametrize("name", fast_first(PIPELINES))
def test_architectures_are_told_by_the_denoisers_class(name):
    """FLUX.2, HunyuanVideo, Chroma and AuraFlow have sites of FLUX.1's names, Mochi SD 3's."""
    pipeline = pipeline_of(name)
    base = base_of(pipeline, pipeline_sites(pipeline))
    assert (base.architecture in ARCHITECTURES) == (name not in OTHERS)
    assert name not in OTHERS or base.architecture.title == type(pipeline).__name__


def test_a_pipeline_without_a_loader_is_refused():
    pipeline = type("OtherPipeline", (), {"transformer": pipeline_of("Wan").transformer})()
    with pytest.raises(IterisError, match="OtherPipeline has no supported unet or transformer"):
        base_of(pipeline, pipeline_sites(pipeline))
