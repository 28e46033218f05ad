"""How time and peak memory grow with the number of LoRAs, their rank and the samples (toybox).

``python benchmarks/speed/growth.py`` prints JSON. Memory is the peak of live tensors beyond the
model, of one further merge.
"""

from __future__ import annotations

import json
import time
from statistics import median
from typing import Any

from models import is_attention, random_lora, toybox_host

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.activations.meter import MemoryMeter
from toybox import TEMPLATES

BASE = {"loras": 2, "rank": 8, "samples": 50}
STEPS = {"loras": (2, 4, 8, 16), "rank": (4, 16, 64, 128), "samples": (10, 50, 100, 400)}
QUICK = {"loras": (2, 4), "rank": (4, 16), "samples": (10, 50)}


BUDGET = 128 * 2**20


def measure(
    host: Any, rounds: int, loras: int, rank: int, samples: int, budget: int | None = None
) -> dict[str, float]:
    concepts = [
        Concept(
            random_lora(host, seed, rank, is_attention), trigger=f"sks{seed}", class_word="star"
        )
        for seed in range(loras)
    ]
    calibration = Calibration(samples=samples, timesteps=1, latents="noise", templates=TEMPLATES)

    def merge() -> Any:
        return merge_loras(host, concepts, calibration=calibration, memory_budget=budget)

    seconds: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        merge()
        seconds.append(time.perf_counter() - started)
    with MemoryMeter() as meter:
        merge()
    return {"seconds": median(seconds), "peak_mib": meter.peak / 2**20}


def compare(rounds: int, *, quick: bool) -> dict[str, dict[str, dict[str, float]]]:
    """what grows → its value → seconds and peak; samples also within :data:`BUDGET`."""
    host = toybox_host()
    measure(host, 1, **{**BASE, "samples": 4})  # warm up
    steps = QUICK if quick else STEPS
    found = {
        what: {str(value): measure(host, rounds, **{**BASE, what: value}) for value in values}
        for what, values in steps.items()
    }
    bounded = {
        str(count): measure(host, rounds, **{**BASE, "samples": count}, budget=BUDGET)
        for count in steps["samples"]
    }
    return {**found, f"samples in {BUDGET >> 20} MiB": bounded}


if __name__ == "__main__":
    print(json.dumps(compare(3, quick=False), indent=1))
