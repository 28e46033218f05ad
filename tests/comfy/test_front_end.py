"""Every graph in ComfyUI's own front end, headless.

Needs node, playwright-core (in NODE_PATH) and Chromium (CHROMIUM, or /usr/bin/chromium).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from client import Client

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
RUNS = ("quick_start_toybox",)


def _ready() -> bool:
    if (
        shutil.which("node") is None
        or not Path(os.environ.get("CHROMIUM", "/usr/bin/chromium")).exists()
    ):
        return False
    found = subprocess.run(["node", "-e", "require('playwright-core')"], capture_output=True)
    return found.returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _ready(), reason="needs node, playwright-core and Chromium"),
]


def look(client: Client, graph: Path, picture: Path, *wishes: str) -> dict[str, Any]:
    port = client.base.rpartition(":")[2]
    script = Path(__file__).with_name("front_end.js")
    command = ["node", str(script), port, str(graph), str(picture), *wishes]
    found = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda path: path.stem)
def test_graph_opens(client: Client, graph: Path, tmp_path: Path) -> None:
    wishes = ("run",) if graph.stem in RUNS else ()
    before = client.get("/history")
    seen = look(client, graph, tmp_path / "seen.png", *wishes)
    assert seen["nodes"] == len(json.loads(graph.read_text())["nodes"])
    assert seen["missing"] == []
    assert seen["toasts"] == []
    assert seen["dialogs"] == []
    assert seen["errors"] == []
    if wishes:
        new = [run for key, run in client.get("/history").items() if key not in before]
        assert [run["status"]["status_str"] for run in new] == ["success"]
    assert graph.with_suffix(".jpg").is_file()


def test_help_page_renders(client: Client, tmp_path: Path) -> None:
    seen = look(
        client, ROOT / "workflows" / "quick_start_toybox.json", tmp_path / "help.png",
        "help", "IterisMerge",
    )  # fmt: skip
    assert "Merges the concepts into one LoRA" in seen["text"].replace("\n", " ")
