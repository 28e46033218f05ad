"""A merge on one graphics card, in less than nine minutes: ``make bench-gpu``.

It needs only this checkout and its Python packages. It measures, in this order and as time permits
(``--minutes``): the rate at which the card multiplies matrices; GPU against CPU on small models; SD
1.5 at 512, SDXL, FLUX.1 and Z-Image at 1024 pixels, of full size with random weights, in bfloat16
and with a base in float8; ``tests/memory/test_gpu.py``. Each model is merged according to the plan,
with all memory and with four fifths of what that used, and with every strategy for a sweep.
Anything without time is listed under ``skipped``.

``share`` is the time of all rows' forwards at the measured rate, as a share of the merge's seconds.
``python benchmarks/gpu.py --tiny`` (or ``QUICK=1``) runs everything on reduced models, and on the
CPU if there is no card.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import gpu_pipelines
import torch
import transformers
from gpu_pipelines import MODELS, Model
from markdown_tables import table as markdown_table
from outputs import QUICK, ROOT, result_file, write
from torch.utils.flop_counter import FlopCounterMode

from iteris_core import Calibration, merge_loras
from iteris_core.activations.memory import MemoryMeter, wait_for
from iteris_core.passes import planner
from iteris_core.passes.footprint import Footprint
from iteris_core.passes.planner import Plan

sys.path.insert(0, str(ROOT / "benchmarks" / "speed"))

from floor import bare_forward
from ways import WAYS, difference, forced

GIB = 2**30
SAMPLES, AT_ONCE, RIDGE = 4, 4, 1e-3
TESTS_SECONDS = 100  # kept for tests/memory/test_gpu.py
BASES = {"bfloat16": False, "float8": True}
ALL, LESS = "planned, all memory", "planned, less memory"


class Bench:
    """Measurements go into ``found``, and to ``path`` as they arrive."""

    def __init__(self, device: torch.device, path: Path, seconds: float, *, tiny: bool) -> None:
        self.device, self.path, self.tiny = device, path, tiny
        self.ends = time.perf_counter() + seconds
        cuda = device.type == "cuda"
        self.found: dict[str, Any] = {
            "card": torch.cuda.get_device_name(device) if cuda else "none: the CPU",
            "torch": torch.__version__,
            "tiny": tiny,
            "skipped": [],
        }

    def left(self) -> float:
        return self.ends - time.perf_counter()

    def within(self, expected: float, what: str) -> bool:
        """Whether there is time for ``what``; if not, prints so."""
        if self.left() - TESTS_SECONDS * (not self.tiny) >= expected:
            return True
        self.found["skipped"].append(what)
        print(f"{what}: skipped, {self.left():.0f} s are left", flush=True)
        return False

    def write(self) -> None:
        write(self.path, self.found)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations per second for products of square matrices, best of five rounds."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first one warms up
        wait_for(device)
        started = time.perf_counter()
        for _ in range(4):
            left @ right
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 4 * 2 * size**3 / best


def against_cpu(model: Model, device: torch.device) -> float:
    """The largest relative difference of a site's merged change, for a reduced pipeline in float32.
    Some ridge is needed, because otherwise both are arbitrary in some directions of a random
    model."""
    found: list[Any] = []
    for place in (torch.device("cpu"), device):
        host = gpu_pipelines.make_host(model, place, tiny=True, dtype=torch.float32)
        result = merge_loras(
            host,
            gpu_pipelines.concepts(model, host),
            settings={"ridge": RIDGE},
            calibration=Calibration(samples=6, timesteps=2, latents="noise", latent_size=8),
        )
        found.append({site: change.to(device="cpu") for site, change in result.lora.sites.items()})
    return difference(*found)


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, float]]:
    """Context that records seconds and the peak of additional memory."""
    seen: dict[str, float] = {}
    gc.collect()
    cuda = device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    meter = nullcontext() if cuda else MemoryMeter()
    wait_for(device)
    started = time.perf_counter()
    with meter as counted:
        yield seen
    wait_for(device)
    seen["seconds"] = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else counted.peak
    seen["peak_gib"] = peak / GIB


@contextmanager
def plans() -> Iterator[list[tuple[Sequence[Footprint], Plan]]]:
    """Context that records arguments and results of :func:`plan_stage` for every planned stage."""
    made: list[tuple[Sequence[Footprint], Plan]] = []
    plan_stage = planner.plan_stage

    def noted(*args: Any, **more: Any) -> Any:
        found = plan_stage(*args, **more)
        made.append((args[0], found))
        return found

    with patch.object(planner, "plan_stage", noted):
        yield made


def measure(bench: Bench, model: Model, fp8: bool, label: str) -> dict[str, Any]:
    """Way → seconds, peak, share; and the bare forward of the same rows."""
    device = bench.device
    host = gpu_pipelines.make_host(model, device, tiny=bench.tiny, fp8=fp8)
    concepts = gpu_pipelines.concepts(model, host)
    side = 8 if bench.tiny else model.side
    calibration = Calibration(samples=SAMPLES, timesteps=1, latents="noise", latent_size=side)
    found: dict[str, Any] = {}
    with FlopCounterMode(display=False) as counter:
        bare_forward(host, concepts, calibration, AT_ONCE)  # and warm up
    with watched(device) as seen:
        bare_forward(host, concepts, calibration, AT_ONCE)
    operations = counter.get_total_flops()
    rate = bench.found["matrix_tflops"]["bfloat16"] * 1e12
    found["bare forward"] = {**seen, "share": operations / seen["seconds"] / rate}
    runs = {
        ALL: nullcontext(),
        LESS: nullcontext(),
        **{way: forced(way) for way in WAYS},
    }
    expected, first, less = 6 * seen["seconds"], None, 0.0
    predicted: dict[str, float] = {}
    for name, way in runs.items():
        memory: Any = {ALL: "free", LESS: round(less * GIB)}.get(name)
        if not bench.within(1.5 * expected, f"{label}, {name}"):
            continue
        try:
            with way, plans() as made, watched(device) as seen:
                result = merge_loras(
                    host,
                    concepts,
                    settings={"micro_batch": AT_ONCE, "ridge": RIDGE},
                    calibration=calibration,
                    memory_budget=memory,
                )
        except Exception as error:  # the other ways are to be measured all the same
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{label}, {name}: {error}", flush=True)
            continue
        expected = seen["seconds"]
        entry = {**seen, "share": operations / seen["seconds"] / rate, "rows": result.report.rows}
        if made:
            predicted |= of_ways([footprints for footprints, _ in made])
            predicted[name] = max(plan.bytes for _, plan in made) / GIB
            entry["plan"] = list(result.report.plan)
            less = less or 0.8 * predicted[name]
        if name in predicted:
            entry["plan_gib"] = predicted[name]
        first = first or result.lora.sites
        if result.report.rows == 2 * SAMPLES:
            entry["difference"] = difference(first, result.lora.sites)
        found[name] = entry
        print(f"{label}, {name}:", *figures(entry), flush=True)
    return found


def of_ways(stages: Sequence[Sequence[Footprint]]) -> dict[str, float]:
    """The plan's expected GiB for each way, with all rows waiting there."""
    found: dict[str, float] = {}
    for some in (some for footprints in stages for some in footprints):
        name = some.strategy.name
        gib = some.bytes_of(len(some.stage.concept_ids), AT_ONCE) / GIB
        found[name] = max(gib, found.get(name, 0.0))
    return found


def gpu_tests(bench: Bench) -> str:
    """The last line of ``tests/memory/test_gpu.py``."""
    command = [sys.executable, "-m", "pytest", "tests/memory/test_gpu.py", "-m", "gpu", "-q"]
    try:
        ran = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(bench.left(), 1)
        )
    except subprocess.TimeoutExpired:
        return "not done when the time was over"
    return ran.stdout.strip().splitlines()[-1] if ran.stdout.strip() else ran.stderr[-300:]


def table(found: dict[str, Any]) -> str:
    rows: list[list[str]] = []
    for name, bases in found["models"].items():
        for base, ways in bases.items():
            for way, entry in ways.items():
                cells = [entry["error"][:60]] if "error" in entry else figures(entry)
                rows.append([name, base, way, *cells])
    heads = ("model", "base", "way", "seconds", "peak GiB", "plan GiB", "share")
    return "\n".join(markdown_table(heads, rows, labels=3))


def figures(entry: dict[str, Any]) -> list[str]:
    plan = f"{entry['plan_gib']:.3g}" if "plan_gib" in entry else ""
    return [
        f"{entry['seconds']:.2f}",
        f"{entry['peak_gib']:.3g}",
        plan,
        f"{entry['share']:.1%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", default=QUICK)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="models whose name has this text")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu" and not options.tiny:
        parser.error("there is no card: --tiny runs everything on reduced models instead")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    path = options.output or result_file("gpu.json", whole=not options.tiny)
    bench = Bench(device, path, 60 * options.minutes, tiny=options.tiny)
    run(bench, options.only)


def run(bench: Bench, only: str) -> None:
    found, size = bench.found, 256 if bench.tiny else 8192
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's default for convolutions in float32
    found["matrix_tflops"] = {
        name: matrix_rate(bench.device, getattr(torch, name), size) / 1e12
        for name in ("bfloat16", "float32")
    }
    print(found["card"], json.dumps(found["matrix_tflops"]), flush=True)
    found["gpu_against_cpu"] = {}
    for model in MODELS.values():
        if bench.within(20, f"GPU against CPU on {model.reduced}"):
            found["gpu_against_cpu"][model.reduced] = against_cpu(model, bench.device)
    print("GPU against CPU:", json.dumps(found["gpu_against_cpu"]), flush=True)
    found["models"] = {name: {} for name in MODELS if only in name}
    for base, fp8 in BASES.items():
        for name in found["models"]:
            label = f"{name}, {base}"
            if bench.within(20, label):
                try:
                    found["models"][name][base] = measure(bench, MODELS[name], fp8, label)
                except Exception as error:  # such as a card that does not hold the model
                    found["models"][name][base] = {"made": {"error": str(error)}}
                    print(f"{label}: {error}", flush=True)
                bench.write()
    if bench.device.type == "cuda":
        found["tests"] = gpu_tests(bench)
        print("tests/memory/test_gpu.py:", found["tests"], flush=True)
    bench.write()
    print(table(found))


if __name__ == "__main__":
    main()
