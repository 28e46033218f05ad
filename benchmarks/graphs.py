"""CPU seconds and memory of the toybox's example graphs, on a ComfyUI without a graphics card.

``COMFYUI_PATH=… NODE_PATH=… python benchmarks/graphs.py [NAME …]`` with ComfyUI's own Python. Each
graph is opened in its front end (which needs what ``tests/comfy/test_front_end.py`` says), and what
that would send runs on a server that has just started. Into ``results/graphs.json``, from which the
notes of the graphs are (``tests/project/test_graphs.py``); Linux only.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from outputs import ROOT, add, result_file

sys.path.append(str(ROOT / "tests" / "comfy"))

from client import Client
from conftest import running

GRAPHS = ("quick_start_toybox", "two_in_one_picture", "compare_methods", "score_pictures")
FRONT_END = ROOT / "tests" / "comfy" / "front_end.js"


def measured(name: str, base: Path) -> dict[str, Any]:
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "iteris-lora").symlink_to(ROOT)
    with running(base) as client:
        graph = opened(client, ROOT / "workflows" / f"{name}.json", base / "seen.png")
        load, started = os.getloadavg()[0], time.perf_counter()
        (server,) = psutil.Process().children()
        busy = sum(server.cpu_times()[:2])
        client.run(graph)
        return {
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(sum(server.cpu_times()[:2]) - busy, 1),
            "peak_gib": round(peak(server) / 2**30, 2),
            "threads": torch.get_num_threads(),
            "load": round(load, 2),
            "comfyui": client.get("/system_stats")["system"]["comfyui_version"],
        }


def opened(client: Client, file: Path, picture: Path) -> dict[str, Any]:
    """The prompt that the front end would send."""
    port = client.base.rpartition(":")[2]
    command = ["node", str(FRONT_END), port, str(file), str(picture), "prompt"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    return json.loads(found.stdout.splitlines()[-1])["prompt"]


def peak(server: psutil.Process) -> int:
    """The server's peak memory, in bytes."""
    status = Path(f"/proc/{server.pid}/status").read_text(encoding="utf-8")
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kib) * 1024


def main(names: list[str]) -> None:
    for name in names or GRAPHS:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(name, Path(folder))
        print(name, json.dumps(found), flush=True)
        add(result_file("graphs.json"), name, found)


if __name__ == "__main__":
    main(sys.argv[1:])
