"""Our files in stock ComfyUI: every key is read, and ΔW and outputs match diffusers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from iteris_core import Lora, LowRank, write_lora
from iteris_core.lora_files import read_lora_file, released_base

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH is not set"),
]
PROBE = Path(__file__).parent / "probe.py"
ROOT = Path(os.environ.get("COMFYUI_PATH", "."))


def probe(*arguments) -> None:
    """With COMFYUI_PYTHON, or the environment ``comfy-venv`` beside the checkout, or this one."""
    beside = ROOT.parent / "comfy-venv" / "bin" / "python"
    python = os.environ.get("COMFYUI_PYTHON", str(beside) if beside.exists() else sys.executable)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, str(PROBE), str(ROOT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def trained(site: str) -> bool:
    """What LoRAs change: attention, feed-forward, resnets, modulation; not the embeddings."""
    if site.startswith("text"):
        parts = (".self_attn.", ".mlp.", "SelfAttention", "DenseReluDense")
    else:
        parts = (".attentions.", ".resnets.", "samplers.", "transformer_blocks.", "norm_out",
                 "transformer.proj_out")  # fmt: skip
    return any(part in site for part in parts)


def make(kind: str, sites, rank: int = 2) -> Lora:
    base = released_base(kind)
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for site in sites:
        shape = base.shapes[site]
        width = torch.Size(shape[1:]).numel()
        up = torch.randn(shape[0], rank, generator=generator)
        down = torch.randn(rank, width, generator=generator) / width
        changes[site] = LowRank(up, down, tuple(shape[2:]) or None)
    return Lora(changes, base=base)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3", "flux"])
def test_changes_are_the_same_site_by_site(kind, tmp_path):
    base = released_base(kind)
    sites = [site for site in base.shapes if trained(site)]
    # One block of every kind: ΔW of a whole model would not fit into memory.
    blocks = {
        "sd1": ("down_blocks.1.", "up_blocks.3.2.", "mid_block.resnets.1."),
        "sdxl": ("up_blocks.2.", "down_blocks.1.attentions.1.", "mid_block.resnets.0."),
        "sd3": (".transformer_blocks.0.", ".transformer_blocks.23."),
        "flux": ("r.transformer_blocks.18.attn", ".single_transformer_blocks.37.", "k.18.norm"),
    }
    chosen = [s for s in sites if s.startswith("text") and (".layers.1." in s or ".block.1." in s)]
    chosen += [s for s in sites if any(f".{block}" in s or block in s for block in blocks[kind])]
    chosen += [s for s in sites if "norm_out" in s or s == "transformer.proj_out"]
    lora = make(kind, dict.fromkeys(chosen))
    path = write_lora(lora, tmp_path / "a.safetensors", dtype="float32")
    probe(kind, path, tmp_path / "out.safetensors")
    assert json.loads(metadata(tmp_path / "out.safetensors")["unmatched"]) == []
    found = load_file(tmp_path / "out.safetensors")
    again = read_lora_file(path, base)
    for site, change in again.sites.items():
        x = torch.randn(change.shape[1], 3, generator=torch.Generator().manual_seed(0))
        ours = change.up @ (change.down @ x)
        assert float((found.pop(site) - ours).norm() / ours.norm()) < 1e-4, site
    assert set(again.sites) == set(lora.sites)
    # Rows of a fused weight that no site of ours changes are there too, as zeros.
    assert not any(bool(delta.any()) for delta in found.values())


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3"])
def test_every_key_of_a_whole_model_is_taken(kind, tmp_path):
    base = released_base(kind)
    sites = [site for site in base.shapes if trained(site)]
    small = make(kind, sites, rank=1)
    path = write_lora(small, tmp_path / "a.safetensors")
    names = tmp_path / "names.safetensors"
    probe(kind, path, names, "keys")
    assert json.loads(metadata(names)["unmatched"]) == []
    # A patch is of a whole weight of ComfyUI's, of which ours are fused pieces in SD 3.
    assert 3 * int(metadata(names)["patched"]) == len(load_file(path))
    assert kind == "sd3" or int(metadata(names)["patched"]) == len(sites)


@pytest.mark.slow
def test_outputs_are_those_of_diffusers(tmp_path):
    """With ITERIS_CHECKPOINT and ITERIS_PIPELINE: one random SD 1.5 in both forms."""
    checkpoint, folder = os.environ.get("ITERIS_CHECKPOINT"), os.environ.get("ITERIS_PIPELINE")
    if not checkpoint or not folder:
        pytest.skip("ITERIS_CHECKPOINT and ITERIS_PIPELINE are not set")
    from diffusers import StableDiffusionPipeline

    from iteris_core.hosts.diffusers_lora import base_of, pipeline_sites

    pipeline = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True).to("cpu")
    pipeline.to(torch.float32)
    pipeline.tokenizer.model_max_length = 77
    sites = pipeline_sites(pipeline)
    base = base_of(pipeline, sites)
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for site, shape in base.shapes.items():
        if trained(site):
            width = torch.Size(shape[1:]).numel()
            up = torch.randn(shape[0], 4, generator=generator) / 4
            down = torch.randn(4, width, generator=generator) / width**0.5
            changes[site] = LowRank(up, down, tuple(shape[2:]) or None)
    path = write_lora(Lora(changes, base=base), tmp_path / "a.safetensors")
    probe(checkpoint, path, tmp_path / "out.safetensors")
    assert json.loads(metadata(tmp_path / "out.safetensors")["unmatched"]) == []
    theirs = load_file(tmp_path / "out.safetensors")
    pipeline.load_lora_weights(str(path))
    with torch.no_grad():
        text = pipeline.encode_prompt("a photo of a dog", "cpu", 1, False)[0]
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        noise = pipeline.unet(latents, torch.tensor([500.0]), theirs["text"]).sample
    assert float((text - theirs["text"]).norm() / text.norm()) < 2e-3
    assert float((noise - theirs["noise"]).norm() / noise.norm()) < 1e-4
