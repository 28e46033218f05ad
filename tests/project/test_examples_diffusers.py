"""The examples for SDXL and FLUX run on tiny pipelines, and diffusers loads what they write."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
from bases import make_lora, outputs, tiny, tiny_base
from diffusers import AutoencoderKL

from iteris_core import write_lora

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_an_example_writes_a_lora(kind, tmp_path):
    pipeline = copy.deepcopy(tiny(kind))
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipeline.register_modules(vae=vae)
    pipeline.save_pretrained(tmp_path / "base")
    sites = [site for site in tiny_base(kind).shapes if site.endswith(("to_q", "to_v"))]
    options = []
    for seed, word in ((1, "cat"), (2, "dog")):
        file = tmp_path / f"{word}.safetensors"
        write_lora(make_lora(kind, sites, seed), file, layout="peft")
        options += ["--lora", f"{file}:s{seed}:{word}"]
    merged = tmp_path / "merged.safetensors"
    command = [
        *(sys.executable, ROOT / "examples" / f"{kind}.py", tmp_path / "base", *options),
        *("--samples", "2", "--latent-size", "8", "-o", merged),
    ]
    if kind == "flux":
        command += ["--layout", "peft"]  # diffusers reads kohya's in FLUX.1's own width only
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Merged 2" in done.stdout
    before = outputs(kind, pipeline)
    pipeline.load_lora_weights(merged)
    after = outputs(kind, pipeline)
    denoiser = "transformer" if kind == "flux" else "unet"
    assert float((after[denoiser] - before[denoiser]).norm() / before[denoiser].norm()) > 1e-3
