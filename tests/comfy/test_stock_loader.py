"""Files of ours in the stock LoraLoader and in diffusers: the same outputs of text encoders and
UNet, on an SD 1.5 with one block a side and on a reduced SDXL."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import reduced_models
import torch
from reduced_pipelines import sdxl_pipeline
from safetensors import safe_open
from test_files import trained
from thin_models import thin_pipeline
from torch import Tensor

from iteris_core import Lora, LowRank, write_lora
from iteris_core.hosts.diffusers_lora import base_of, pipeline_parameters, pipeline_sites

PROMPT = "a photo of a sks dog in the snow"


def everywhere(pipeline: Any) -> Lora:
    """A random LoRA of every site that trainers train."""
    base = base_of(pipeline, pipeline_sites(pipeline))
    generator = torch.Generator().manual_seed(0)
    changes: dict[str, LowRank] = {}
    for site, shape in base.shapes.items():
        if trained(site):
            width = torch.Size(shape[1:]).numel()
            up = torch.randn(shape[0], 4, generator=generator) / 8
            down = torch.randn(4, width, generator=generator) / width**0.5
            kernel = (shape[2], shape[3]) if len(shape) == 4 else None
            changes[site] = LowRank(up, down, kernel)
    return Lora(changes, base=base)


def added(model: Any, pooled: Tensor) -> dict[str, Tensor]:
    """SDXL's sizes (1024 × 768) and pooled text as ComfyUI's one vector; nothing for SD 1.5."""
    if model.model.adm_channels == 0:
        return {}
    return {"y": model.model.encode_adm(pooled_output=pooled, width=768, height=1024)}


def in_comfyui(model: Any, clip: Any, latents: Tensor) -> dict[str, Tensor]:
    import comfy.model_management as memory

    with torch.no_grad():
        text, pooled = clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)
        memory.load_models_gpu([model])
        network = model.model.diffusion_model
        more = added(model, pooled)
        noise = network(latents, torch.tensor([500.0]), context=text.float(), **more)
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
def stock(pack: ModuleType, tmp_path: Path) -> Any:
    """The node itself, which finds files of the test's own folder."""
    import folder_paths

    import nodes

    assert hasattr(nodes, "NODE_CLASS_MAPPINGS")
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    return nodes.LoraLoader()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_outputs_are_those_of_diffusers(
    stock: Any, thin: Any, kind: str, dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, clip = thin if kind == "sd1" else reduced_models.sdxl()
    pipeline = thin_pipeline() if kind == "sd1" else sdxl_pipeline(model, clip)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    before = in_comfyui(model, clip, latents)
    file = write_lora(everywhere(pipeline), tmp_path / f"{kind}-{dtype}.safetensors", dtype=dtype)
    with caplog.at_level(logging.WARNING):
        patched = stock.load_lora(model, clip, file.name, 1.0, 1.0)
    assert "not loaded" not in caplog.text
    with safe_open(file, "pt") as tensors:
        modules = sum(key.endswith(".alpha") for key in tensors.keys())  # noqa: SIM118
    assert len(patched[0].patches) + len(patched[1].patcher.patches) == modules
    theirs = in_comfyui(*patched, latents)
    pipeline.load_lora_weights(str(file))
    ours = in_diffusers(pipeline, latents, theirs["text"], theirs["pooled"])
    errors = {n: float((theirs[n] - o).norm() / o.norm()) for n, o in ours.items()}
    moved = {n: float((theirs[n] - before[n]).norm() / o.norm()) for n, o in ours.items()}
    assert all(error < 1e-5 for error in errors.values()), errors
    assert all(move > 0.1 for move in moved.values()), moved


def test_norms_and_biases_are_those_of_a_fine_tune(
    stock: Any, thin: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file with all of them, and the same added to the weights of diffusers' pipeline."""
    (model, clip), pipeline = thin, thin_pipeline()
    sites, modules = pipeline_sites(pipeline), pipeline_parameters(pipeline)
    lora, generator = everywhere(pipeline), torch.Generator().manual_seed(1)
    vectors = {
        name: 0.05 * torch.randn(getattr(module, leaf).shape, generator=generator)
        for name, module in modules.items()
        if getattr(module, leaf := name.rpartition(".")[2]).ndim == 1
    }
    file = write_lora(replace(lora, vectors=vectors), tmp_path / "all.safetensors", dtype="float32")
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        patched = stock.load_lora(model, clip, file.name, 1.0, 1.0)
    assert "not loaded" not in caplog.text
    patches = len(patched[0].patches) + len(patched[1].patcher.patches)
    assert patches == len(lora.sites) + len(vectors)
    theirs = in_comfyui(*patched, latents)
    with torch.no_grad():
        for site, change in lora.sites.items():
            sites[site].weight += change.dense().reshape(sites[site].weight.shape)
        for name, vector in vectors.items():
            getattr(modules[name], name.rpartition(".")[2]).add_(vector)
    ours = in_diffusers(pipeline, latents, theirs["text"], theirs["pooled"])
    errors = {n: float((theirs[n] - o).norm() / o.norm()) for n, o in ours.items()}
    assert all(error < 1e-5 for error in errors.values()), errors
