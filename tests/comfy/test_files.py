"""Our files in stock ComfyUI: every key is read, and changes and outputs are those of diffusers."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reduced_models
import torch
from reduced_pipelines import sdxl_pipeline
from released_models import CONFIGS, diffusers_names, released
from safetensors.torch import load_file
from thin_models import load_thin, thin_pipeline
from torch import Tensor

from iteris_core import Lora, LowRank, write_lora
from iteris_core.hosts.diffusers_lora import base_of, pipeline_parameters, pipeline_sites
from iteris_core.lora_files import read_lora_file, released_base

PROMPT = "a photo of a sks dog in the snow"


def trained(site: str) -> bool:
    """What LoRAs change: attention, feed-forward, resnets, modulation; not the embeddings."""
    if site.startswith("text"):
        parts = (".self_attn.", ".mlp.", "SelfAttention", "DenseReluDense")
    else:
        parts = (".attentions.", ".resnets.", "samplers.", "transformer_blocks.", "norm_out",
                 "transformer.proj_out")  # fmt: skip
    return any(part in site for part in parts)


def random_lora(base: Any, sites: Any, rank: int) -> Lora:
    generator = torch.Generator().manual_seed(0)
    changes: dict[str, LowRank] = {}
    for site in sites:
        out, *rest = base.shapes[site]
        width = torch.Size(rest).numel()
        up = torch.randn(out, rank, generator=generator) / 8
        down = torch.randn(rank, width, generator=generator) / width**0.5
        changes[site] = LowRank(up, down, tuple(rest[1:]) or None)
    return Lora(changes, base=base)


# -- released models, without their weights -------------------------------------------------------


def patches_of(kind: str, path: Path, caplog: pytest.LogCaptureFixture) -> tuple[Any, Any]:
    """The weights' shapes, and the patches that Load LoRA makes of a file, of which it leaves no
    key."""
    import comfy.lora
    import comfy.lora_convert

    model, clip = released(kind)
    key_map = comfy.lora.model_lora_keys_unet(model, {})
    key_map = comfy.lora.model_lora_keys_clip(clip, key_map)
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(load_file(path)), key_map)
    assert "not loaded" not in caplog.text
    return {k: v.shape for m in (model, clip) for k, v in m.state_dict().items()}, patches


BLOCKS = {
    "sd1": ("down_blocks.1.", "up_blocks.3.2.", "mid_block.resnets.1."),
    "sdxl": ("up_blocks.2.", "down_blocks.1.attentions.1.", "mid_block.resnets.0."),
    "sd3": (".transformer_blocks.0.", ".transformer_blocks.23."),
    "flux": ("r.transformer_blocks.18.attn", ".single_transformer_blocks.37.", "k.18.norm"),
}
"""One block of every kind: ΔW of a whole model would not fit into memory."""


@pytest.mark.parametrize("kind", CONFIGS)
def test_changes_are_the_same_site_by_site(
    library: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    base = released_base(kind)
    sites = [site for site in base.shapes if trained(site)]
    chosen = [s for s in sites if s.startswith("text") and (".layers.1." in s or ".block.1." in s)]
    chosen += [s for s in sites if any(f".{block}" in s or block in s for block in BLOCKS[kind])]
    chosen += [s for s in sites if "norm_out" in s or s == "transformer.proj_out"]
    lora = random_lora(base, dict.fromkeys(chosen), 2)
    path = write_lora(lora, tmp_path / "a.safetensors", dtype="float32")
    shapes, patches = patches_of(kind, path, caplog)
    found = diffusers_names(kind, changes_of(patches, shapes))
    again = read_lora_file(path, base)
    assert set(again.sites) == set(lora.sites)
    for site, change in again.sites.items():
        x = torch.randn(change.shape[1], 3, generator=torch.Generator().manual_seed(0))
        ours, theirs = change.up @ (change.down @ x), found.pop(site).flatten(1) @ x
        assert float((theirs - ours).norm() / ours.norm()) < 1e-4, site
    # Rows of a fused weight that no site of ours changes are there too, as zeros.
    assert not any(bool(delta.any()) for delta in found.values())


def changes_of(patches: Any, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Weight → what the patches add to it, in whole or in parts."""
    found: dict[str, Tensor] = {}
    for target, patch in patches.items():
        key, offset, function, *_ = (
            *(target if isinstance(target, tuple) else (target,)),
            None,
            None,
        )
        whole = found.setdefault(key, torch.zeros(shapes[key]))
        into = whole if offset is None else whole.narrow(*offset)
        zero = torch.zeros(into.shape)
        into += patch.calculate_weight(zero, key, 1.0, 1.0, None, function or (lambda a: a))
    return found


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3"])
def test_every_key_of_a_whole_model_is_taken(
    library: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    base = released_base(kind)
    sites = [site for site in base.shapes if trained(site)]
    path = write_lora(random_lora(base, sites, 1), tmp_path / "a.safetensors")
    _, patches = patches_of(kind, path, caplog)
    # A patch is of a whole weight of ComfyUI's, of which ours are fused pieces in SD 3.
    assert 3 * len(patches) == len(load_file(path))
    assert kind == "sd3" or len(patches) == len(sites)


# -- outputs, of an SD 1.5 with one block a side and of a reduced SDXL ----------------------------


def in_comfyui(model: Any, clip: Any, latents: Tensor) -> dict[str, Tensor]:
    """SDXL's sizes (1024 × 768) and pooled text are one vector; SD 1.5 has none."""
    import comfy.model_management as memory

    with torch.no_grad():
        text, pooled = clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)
        memory.load_models_gpu([model])
        more = {}
        if model.model.adm_channels:
            more["y"] = model.model.encode_adm(pooled_output=pooled, width=768, height=1024)
        time = torch.tensor([500.0])
        noise = model.model.diffusion_model(latents, time, context=text.float(), **more)
    return {"text": text, "pooled": pooled, "noise": noise}


def in_diffusers(pipeline: Any, latents: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Tensor]:
    """The UNet on ComfyUI's own text, so that its outputs are compared for themselves."""
    more: dict[str, Any] = {}
    with torch.no_grad():
        found = pipeline.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1,
                                       do_classifier_free_guidance=False)  # fmt: skip
        outputs = {"text": found[0]}
        if len(found) > 2:
            outputs["pooled"] = found[2]
            sizes = torch.tensor([[1024.0, 768, 0, 0, 1024, 768]])
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        time = torch.tensor([500.0])
        outputs["noise"] = pipeline.unet(latents, time, text.float(), **more).sample
    return outputs


@pytest.fixture
def stock(pack: Any, tmp_path: Path) -> Any:
    """The node itself, which finds files of the test's own folder."""
    import folder_paths

    import nodes

    assert hasattr(nodes, "NODE_CLASS_MAPPINGS")
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    return nodes.LoraLoader()


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd1 with norms and biases"])
def test_outputs_are_those_of_diffusers(
    stock: Any, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """diffusers loads no norms and biases, so that they are added to its weights."""
    is_sdxl, with_vectors = kind == "sdxl", kind.endswith("biases")
    model, clip = reduced_models.sdxl() if is_sdxl else load_thin(models)
    pipeline = sdxl_pipeline(model, clip) if is_sdxl else thin_pipeline()
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    before = in_comfyui(model, clip, latents)
    base = base_of(pipeline, pipeline_sites(pipeline))
    lora = random_lora(base, [site for site in base.shapes if trained(site)], 4)
    if with_vectors:
        lora = replace(lora, vectors=vectors_of(pipeline))
    file = write_lora(lora, tmp_path / f"{kind}.safetensors", dtype="float32")
    with caplog.at_level(logging.WARNING):
        patched = stock.load_lora(model, clip, file.name, 1.0, 1.0)
    assert "not loaded" not in caplog.text
    patches = len(patched[0].patches) + len(patched[1].patcher.patches)
    assert patches == len(lora.sites) + len(lora.vectors)
    theirs = in_comfyui(*patched, latents)
    if with_vectors:
        add_to_weights(pipeline, lora)
    else:
        pipeline.load_lora_weights(str(file))
    ours = in_diffusers(pipeline, latents, theirs["text"], theirs["pooled"])
    errors = {n: float((theirs[n] - o).norm() / o.norm()) for n, o in ours.items()}
    moved = {n: float((theirs[n] - before[n]).norm() / o.norm()) for n, o in ours.items()}
    assert all(error < 1e-5 for error in errors.values()), errors
    assert all(move > 0.1 for move in moved.values()), moved


def vectors_of(pipeline: Any) -> dict[str, Tensor]:
    """A change of every norm and bias."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: getattr(module, name.rpartition(".")[2])
        for name, module in pipeline_parameters(pipeline).items()
    }
    return {
        name: 0.05 * torch.randn(weight.shape, generator=generator)
        for name, weight in weights.items()
        if weight.ndim == 1
    }


@torch.no_grad()
def add_to_weights(pipeline: Any, lora: Lora) -> None:
    sites, modules = pipeline_sites(pipeline), pipeline_parameters(pipeline)
    for site, change in lora.sites.items():
        sites[site].weight += change.dense().reshape(sites[site].weight.shape)
    for name, vector in lora.vectors.items():
        getattr(modules[name], name.rpartition(".")[2]).add_(vector)
