"""The Ray example merges every pair, resumes where it stopped, and makes one table."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_pipeline, random_lora

from iteris_core import write_lora
from iteris_core.hosts.diffusers import DiffusersHost

pytest.importorskip("ray", reason="ray is not installed")
EXAMPLE = Path(__file__).parents[2] / "examples" / "many_merges.py"


@pytest.mark.slow
def test_every_pair_is_merged_once(tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "base")
    host = DiffusersHost(pipeline)
    concepts = [
        f"{write_lora(random_lora(host, seed), tmp_path / f'l{seed}.safetensors')}:sks{seed}:cat"
        for seed in range(3)
    ]
    out = tmp_path / "out"
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "base"), str(out), *concepts]
    command += ["--calibration", '{"samples": 3, "timesteps": 1, "denoising_steps": 2}']

    def run() -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert "3 merges, 0 there already" in run()
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["concepts"] for row in rows] == ["sks0 + sks1", "sks0 + sks2", "sks1 + sks2"]
    kept = out / rows[0]["file"]
    before = kept.stat().st_mtime_ns
    (out / rows[1]["file"]).with_suffix(".json").unlink()
    assert "3 merges, 2 there already" in run()
    assert kept.stat().st_mtime_ns == before
    assert len(list(out.glob("*.json"))) == 3
