"""A merge of two LoRAs on a model of full size with random weights, on this machine's CPU.

``python benchmarks/full_size.py ["SD 1.5, 512 px"] [--gib 3] [--samples 50] [--timesteps 4]``
prints what was planned and the peak of live tensors beyond the model, and adds it to
``results/full_size.json``. Latents are noise, so that no denoising comes first. Through ComfyUI's
node the same is measured by ``comfyui.py`` with ``--gib``.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from gpu_pipelines import MODELS, concepts, make_host
from outputs import add, result_file

from iteris_core import Calibration, merge_loras
from iteris_core.activations.meter import MemoryMeter
from iteris_core.progress import Progress

FILE = result_file("full_size.json")
GIB = 2**30


def measured(name: str, gib: float, samples: int, timesteps: int) -> dict[str, Any]:
    model = MODELS[name]
    host = make_host(model, torch.device("cpu"), tiny=False)
    calibration = Calibration(
        samples=samples, timesteps=timesteps, latents="noise", latent_size=model.side
    )
    some = concepts(model, host)
    started = time.perf_counter()
    with MemoryMeter() as meter:
        result = merge_loras(
            host, some, calibration=calibration, memory_budget=round(gib * GIB), on_progress=said
        )
    return {
        "plan": result.report.plan,
        "peak_gib": round(meter.peak / GIB, 3),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "threads": torch.get_num_threads(),
    }


def said(progress: Progress) -> None:
    if not progress.total or progress.done % 20 == 0:
        print(time.strftime("%H:%M:%S"), progress, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--gib", type=float, default=3)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--timesteps", type=int, default=4)
    options = parser.parse_args()
    found = measured(options.model, options.gib, options.samples, options.timesteps)
    add(FILE, options.model, found)
    print(options.model, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
