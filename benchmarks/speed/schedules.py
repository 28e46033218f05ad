"""One sweep against Jacobi iterations (the paper's Algorithm 1): how soon the fixed point is there.

``python benchmarks/speed/schedules.py [t5|sd15]`` prints JSON. ``gap`` is the largest relative
distance of a site's change from the sweep's, which is the fixed point itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from models import prompt_concepts, sd15_host, t5_host, text_concepts

from iteris_core import Calibration, Concept, merge_loras

ITERATIONS = (5, 10, 20)
CLOSE = 1e-4


def t5() -> tuple[Any, Sequence[Concept], Calibration]:
    host = t5_host()
    return host, text_concepts(host, 2, 8, 10, tokens=64), Calibration(samples=10)


def sd15() -> tuple[Any, Sequence[Concept], Calibration]:
    host = sd15_host()
    calibration = Calibration(samples=4, timesteps=1, latents="noise", latent_size=16)
    return host, prompt_concepts(host, 2, 32), calibration


MODELS: dict[str, Callable[[], tuple[Any, Sequence[Concept], Calibration]]] = {
    "t5": t5,
    "sd15": sd15,
}


def compare(model: str, rounds: int) -> dict[str, Any]:
    """The paper's objective (``adapter``), float64 moments."""
    host, concepts, calibration = MODELS[model]()
    common = {"objective": "adapter", "weighting": "adapter", "precision": "float64", "ridge": 1e-4}
    settings = {"sweep": {"schedule": "sweep"}} | {
        f"jacobi {count}": {"schedule": "jacobi", "iterations": count} for count in ITERATIONS
    }
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, some in settings.items():
            started = time.perf_counter()
            results[name] = merge_loras(
                host, concepts, settings={**common, **some}, calibration=calibration
            )
            seconds[name].append(time.perf_counter() - started)
    fixed = {site: c.dense().double() for site, c in results["sweep"].lora.sites.items()}
    found: dict[str, Any] = {}
    for name, result in results.items():
        gaps = [
            float((change.dense() - fixed[site]).norm() / fixed[site].norm())
            for site, change in result.lora.sites.items()
        ]
        found[name] = {"seconds": median(seconds[name]), "gap": max(gaps)}
    reached = [name for name, entry in found.items() if name != "sweep" and entry["gap"] <= CLOSE]
    first = reached[0] if reached else f"jacobi {ITERATIONS[-1]}"
    found["reached"] = bool(reached)
    found["ratio"] = found[first]["seconds"] / found["sweep"]["seconds"]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS, nargs="?", default="t5")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(json.dumps(compare(arguments.model, arguments.rounds), indent=1))
