"""Time and memory of a merge on ComfyUI's MODEL and CLIP, as JSON on stdout.

COMFYUI_PATH=… python benchmarks/comfyui.py CHECKPOINT LORA LORA [--samples 50] [--latent-size 64]
[--timesteps 4] [--latents denoising|noise] [--gpu] [--bf16] [--gib 3 [--save NAME]]

``--gib`` is what the merge may take beyond the model; then ``planned`` has the memory plan's lines
and ``live_peak_gib`` the peak of live tensors beyond the model; ``--save`` keeps both under a name
in ``results/full_size.json``, beside those of ``full_size.py``. ``--bf16`` is
ComfyUI's --bf16-unet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
from outputs import ROOT, add, result_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("loras", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--latent-size", type=int, default=64)
    parser.add_argument("--latents", default="denoising")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gib", type=float)
    parser.add_argument("--save", metavar="NAME")
    options = parser.parse_args()
    merging, specs, core = _pack(options.gpu, options.bf16)

    import comfy.sd
    import torch

    with torch.inference_mode():
        model, clip = comfy.sd.load_checkpoint_guess_config(options.checkpoint)[:2]
    before = psutil.Process().memory_info().rss // 2**20
    load = os.getloadavg()[0]
    names = ("samples", "timesteps", "latent_size", "latents")
    calibration = {name: getattr(options, name) for name in names}
    concepts = [
        specs.make_spec(file, trigger=f"sks{number}", class_word="cat")
        for number, file in enumerate(options.loras)
    ]
    started, cpu = time.perf_counter(), time.process_time()
    budget = "free" if options.gib is None else round(options.gib * 2**30)
    meter = core.activations.meter.MemoryMeter()
    with nullcontext() if options.gib is None else meter:
        config = merging.MergeConfig(concepts, calibration=calibration, unmergeable="mean")
        report = merging.merge_on(model, clip, config, memory_budget=budget).report
    found = {
        "sites": len(report.sites),
        "rows": report.rows,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "planned": report.plan,
        "live_peak_gib": round(meter.peak / 2**30, 3),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "rss_before_merge_mb": before,
        "load_before_merge": round(load, 2),
        "threads": torch.get_num_threads(),
        "device": str(model.load_device),
        "gpu_peak_mb": torch.cuda.max_memory_allocated() // 2**20 if options.gpu else None,
    }
    if options.save is not None and options.gib is not None:
        kept = {
            "plan": found["planned"],
            "peak_gib": found["live_peak_gib"],
            "minutes": round(found["seconds"] / 60, 1),
            "threads": found["threads"],
        }
        add(result_file("full_size.json"), options.save, kept)
    print(json.dumps(found | {"calibration": report.calibration | {"templates": "default"}}))


def _pack(gpu: bool, bf16: bool) -> tuple[Any, Any, Any]:
    """The pack's modules, imported as ComfyUI does."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = not gpu
    comfy.cli_args.args.bf16_unet = bf16
    spec = importlib.util.spec_from_file_location(
        "pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["pack"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    names = ("nodes.merging", "nodes.concept_specs", "iteris_core")
    importlib.import_module("pack.iteris_core.activations.meter")
    merging, specs, core = (importlib.import_module(f"pack.{name}") for name in names)
    return merging, specs, core


if __name__ == "__main__":
    main()
