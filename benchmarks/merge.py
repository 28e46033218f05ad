"""Time and memory of a merge on the toybox: one sweep against Jacobi, and micro-batch sizes.

``python benchmarks/merge.py [--rounds 3]`` prints JSON. Every run is a process of its own; peak
memory is that process's, less what it had before the merge. Configurations take turns.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

CONFIGURATIONS = {
    "sweep, one batch": {"micro_batch": 10_000},
    "sweep, 128 rows": {"micro_batch": 128},
    "sweep, 32 rows": {"micro_batch": 32},
    "sweep, 8 rows": {"micro_batch": 8},
    "jacobi, 1 iteration": {"schedule": "jacobi", "iterations": 1},
    "jacobi, 5 iterations": {"schedule": "jacobi", "iterations": 5},
    "jacobi, 10 iterations": {"schedule": "jacobi", "iterations": 10},
    "jacobi, 20 iterations": {"schedule": "jacobi", "iterations": 20},
}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_one(settings: dict[str, object]) -> dict[str, float]:
    import toybox
    from iteris_core import Calibration, Concept, merge_loras
    from iteris_core.hosts.diffusers import DiffusersHost
    from toybox.demo import TEMPLATES

    host = DiffusersHost(toybox.load_pipeline())
    concepts = [
        Concept(host.read_lora(c.lora), trigger=c.token, class_word=c.class_word)
        for c in list(toybox.concepts().values())[:2]
    ]
    calibration = Calibration(latents="noise", templates=TEMPLATES)
    quick = Calibration(samples=2, timesteps=1, latents="noise", templates=TEMPLATES)
    merge_loras(host, concepts, calibration=quick)  # warm up
    before, started = peak_mib(), time.perf_counter()
    result = merge_loras(host, concepts, settings=settings, calibration=calibration)
    return {
        "seconds": time.perf_counter() - started,
        "peak_mib": peak_mib() - before,
        "rows": result.report.rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(CONFIGURATIONS[arguments.one])))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONFIGURATIONS}
    for _ in range(arguments.rounds):
        for name in CONFIGURATIONS:
            command = [sys.executable, __file__, "--one", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    sweep = medians["sweep, 32 rows"]["seconds"]
    for entry in medians.values():
        entry["ratio_to_sweep"] = entry["seconds"] / sweep
    print(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
