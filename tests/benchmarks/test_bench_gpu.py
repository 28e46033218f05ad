"""``make bench-gpu`` with reduced models on the CPU, so that it will also run on a card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = "waiting on the device", "waiting in host memory"
WAYS = [f"{place}{by}" for place in PLACES for by in ("", ", by small blocks", ", by large blocks")]

pytestmark = pytest.mark.slow


def bench(tmp_path: Path, *options: str) -> tuple[dict, str]:
    path = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device=cpu", *options]
    ran = subprocess.run(
        [*command, f"--output={path}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "QUICK": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(path.read_text()), ran.stdout


def test_every_way_is_measured_with_both_bases(tmp_path):
    found, _ = bench(tmp_path, "--only=SD 1.5")
    assert found["card"] == "none: the CPU"
    assert found["skipped"] == []
    assert found["matrix_tflops"]["bfloat16"] > 0
    assert found["gpu_against_cpu"] == {
        name: pytest.approx(0, abs=1e-3) for name in ("SD 1.5", "SDXL", "FLUX.1", "Z-Image")
    }
    bases = found["models"]["SD 1.5, 512 px"]
    assert set(bases) == {"bfloat16", "float8"}
    for ways in bases.values():
        assert set(ways) == {"bare forward", "planned, all memory", "planned, less memory", *WAYS}
        for name, entry in ways.items():
            assert "error" not in entry, (name, entry)
            assert min(entry["seconds"], entry["peak_gib"], entry["share"]) > 0
            assert entry.get("difference", 0) < 1e-2
        whole = ways["planned, all memory"]
        assert whole["rows"] == 10  # 2 of them of generic prompts
        assert whole["peak_gib"] == pytest.approx(whole["plan_gib"], rel=0.25)
        assert ways["planned, less memory"]["plan_gib"] < whole["plan_gib"]
