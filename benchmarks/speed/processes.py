"""One merge in one process with one thread, against two processes with one thread each (gloo).

``python benchmarks/speed/processes.py`` prints JSON: the seconds of the merge alone, without
starting Python and loading the base.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from models import prompt_concepts, sd15_host, toybox_concepts, toybox_host
from torch import distributed, multiprocessing

from iteris_core import Calibration, Runtime, merge_loras
from iteris_core.activations.processes import Processes


def work(rank: int, size: int, folder: str, model: str, rounds: int) -> None:
    torch.set_num_threads(1)
    if model == "sd15":
        host = sd15_host()
        concepts = prompt_concepts(host, 4, 32)
        calibration = Calibration(samples=4, timesteps=1, latents="noise", latent_size=32)
    else:
        from toybox import TEMPLATES

        host = toybox_host()
        concepts = toybox_concepts(host, 4)
        calibration = Calibration(templates=TEMPLATES)
    if size > 1:
        where = f"file://{folder}/group"
        distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    seconds: list[float] = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        merge_loras(
            host,
            concepts,
            calibration=calibration,
            runtime=Runtime(Processes(rank, size)),
            memory_budget=None,
        )
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(seconds[1:]))
    if size > 1:
        distributed.destroy_process_group()


def seconds_of(size: int, model: str, rounds: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (size, folder, model, rounds), nprocs=size)
        return median(json.loads((Path(folder) / "seconds.json").read_text()))


def compare(model: str, rounds: int) -> dict[str, Any]:
    one, two = (seconds_of(size, model, rounds) for size in (1, 2))
    return {"one": one, "two": two, "ratio": one / two}


if __name__ == "__main__":
    print(json.dumps(compare(sys.argv[1] if len(sys.argv) > 1 else "toybox", 3), indent=1))
