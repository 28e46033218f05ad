"""What it costs that rows wait in host memory: against all rows waiting on the device, in turn.

``python benchmarks/speed/ways.py [toybox|sd15] [--rounds N] [--rows N]`` prints JSON. The CPU's
memory passes for a device's, so that copies go at the speed of its memory and nothing of them is
hidden behind a forward. ``mib`` is the peak of live tensors beyond the model, but for what waits in
host memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from models import prompt_concepts, sd15_host, toybox_concepts, toybox_host
from rounds import in_turn, medians

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.activations.host_memory import HostMemory
from iteris_core.activations.meter import MemoryMeter
from iteris_core.passes import loops
from iteris_core.passes.batches import Waiting
from toybox.demo import TEMPLATES

Case = tuple[Any, Sequence[Concept], Calibration]


def toybox() -> Case:
    host = toybox_host()
    calibration = Calibration(samples=50, timesteps=2, latents="noise", templates=TEMPLATES)
    return host, toybox_concepts(host, 2), calibration


def sd15() -> Case:
    host = sd15_host()
    calibration = Calibration(samples=4, timesteps=1, latents="noise", latent_size=32)
    return host, prompt_concepts(host, 2, 16), calibration


CASES: dict[str, Callable[[], Case]] = {"toybox": toybox, "sd15": sd15}
WAYS = {"on the device": None, "in host memory": Waiting(0, torch.device("cpu"), 64 << 30)}


def compare(case: str, rounds: int, rows: int) -> dict[str, Any]:
    """``rows`` a forward; the results have to be the same, bit by bit."""
    host, concepts, calibration = CASES[case]()
    places: list[HostMemory] = []

    def place(*args: Any) -> HostMemory:
        places.append(HostMemory(*args))
        return places[-1]

    def merge(waiting: Waiting | None) -> Any:
        def planned(job: Any, stage: Any, _: Any, fitted: Any, *args: Any, **more: Any) -> Any:
            return stage, replace(fitted, waiting=waiting)

        with patch.object(loops, "plan", planned), patch.object(loops, "HostMemory", place):
            return merge_loras(
                host, concepts, settings={"micro_batch": rows}, calibration=calibration
            )

    merges = {name: lambda w=way: merge(w) for name, way in WAYS.items()}
    seconds = in_turn(merges, rounds, warm=case == "toybox")
    found: dict[str, Any] = {"rows": rows, "seconds": medians(seconds), "mib": {}}
    results: dict[str, Any] = {}
    for name, way in WAYS.items():
        places.clear()
        with MemoryMeter() as meter:
            results[name] = merge(way)
        found["mib"][name] = meter.peak / 2**20
    found["waits_in_mib"] = max(memory.taken for memory in places) / 2**20
    found["moved_mib"] = sum(memory.moved for memory in places) / 2**20
    here, there = (result.lora.sites for result in results.values())
    found["same"] = all(
        torch.equal(here[s].up, c.up) and torch.equal(here[s].down, c.down)
        for s, c in there.items()
    )
    pairs = zip(*(seconds[name] for name in WAYS), strict=True)
    found["ratios"] = [parked / whole for whole, parked in pairs]
    found["ratio"] = sorted(found["ratios"])[len(found["ratios"]) // 2]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES, nargs="?", default="toybox")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    print(json.dumps(compare(options.case, options.rounds, options.rows), indent=1))
