"""Where the time of a merge goes: forward, moments, solves; and a trace for a viewer.

``python benchmarks/speed/parts.py [toybox|sd15] [--trace trace.json]`` prints the shares as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from models import prompt_concepts, sd15_host, toybox_concepts, toybox_host

from iteris_core import Calibration, merge_loras
from iteris_core.activations.collect import SweepCollector
from iteris_core.passes.job import Job
from iteris_core.solve.moments import MomentReduction


def shares(merge: Callable[[], Any]) -> dict[str, float]:
    """Seconds by part; what is left over is the forward with the changes added to it."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - started

        return call

    sweep, job = SweepCollector, Job
    kept = sweep.observe, sweep.take, MomentReduction.solve, job.samples
    sweep.observe = timed("moments", kept[0])
    sweep.take = timed("moments", kept[1])
    MomentReduction.solve = timed("solves", kept[2])
    job.samples = timed("samples", kept[3])
    started = time.perf_counter()
    try:
        merge()
    finally:
        sweep.observe, sweep.take, MomentReduction.solve, job.samples = kept
    total = time.perf_counter() - started
    seconds["forward"] = total - sum(seconds.values())
    return {**seconds, "total": total}


def toybox() -> Callable[[], Any]:
    from toybox.demo import TEMPLATES

    host = toybox_host()
    concepts = toybox_concepts(host, 2)
    calibration = Calibration(latents="noise", templates=TEMPLATES)
    return lambda: merge_loras(host, concepts, calibration=calibration)


def sd15() -> Callable[[], Any]:
    host = sd15_host()
    concepts = prompt_concepts(host, 2, 32)
    calibration = Calibration(samples=4, timesteps=1, latents="noise", latent_size=32)
    return lambda: merge_loras(host, concepts, calibration=calibration)


MODELS = {"toybox": toybox, "sd15": sd15}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS, nargs="?", default="toybox")
    parser.add_argument("--trace", help="A file for chrome://tracing or Perfetto")
    arguments = parser.parse_args()
    run = MODELS[arguments.model]()
    run()
    print(json.dumps(shares(run), indent=1))
    if arguments.trace:
        with torch.profiler.profile() as profile:
            run()
        profile.export_chrome_trace(arguments.trace)
