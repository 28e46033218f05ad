"""The error of the time left that a merge reports on its way.

``python benchmarks/time_left.py`` writes ``results/time_left.json``: of every merge how long it
took, and by how much the time left that it reported after 5, 10, 25, 50 and 75 % of it was off
(0.1: ten per cent too long). Seconds are those of this process, on one thread, so that what else
the machine does is not in them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from outputs import read, result_file, write
from speed.models import prompt_concepts, sd15_host, t5_host, text_concepts, toybox_host

from iteris_core import Calibration, Concept, Progress, merge_loras
from iteris_core.passes.eta import Eta

FILE = result_file("time_left.json")
SHARES = (0.05, 0.1, 0.25, 0.5, 0.75)

Merge = tuple[Any, list[Concept], dict[str, Any]]


def toybox(size: str, **calibration: Any) -> Merge:
    """As ``make demo`` does."""
    from toybox import TEMPLATES, concepts
    from toybox.demo import SETS

    host, world = toybox_host(), concepts()
    chosen = [
        Concept(host.read_lora(world[t].lora), trigger=t, class_word=world[t].class_word)
        for t in SETS[size]
    ]
    return host, chosen, {"calibration": Calibration(templates=TEMPLATES, **calibration)}


def small_sd15() -> Merge:
    """Stable Diffusion 1.5 at a quarter of its width with random weights, latents of 32."""
    host = sd15_host(sample_size=32, block_out_channels=(96, 160, 320, 320), attention_head_dim=4)
    calibration = Calibration(samples=10, timesteps=4, denoising_steps=10)
    return host, prompt_concepts(host, 2, 8), {"calibration": calibration}


def small_t5() -> Merge:
    """T5 at half its width and depth with random weights, texts of 64 tokens."""
    host = t5_host(d_model=384, d_ff=1536, num_layers=6, num_heads=6)
    return host, text_concepts(host, 2, 8, 50, tokens=64), {}


MERGES: Mapping[str, Callable[[], Merge]] = {
    "toybox, 2 concepts": lambda: toybox("2"),
    "toybox, 4 concepts": lambda: toybox("4"),
    "toybox, 2 concepts, noise": lambda: toybox("2", latents="noise"),
    "small SD 1.5": small_sd15,
    "small T5": small_t5,
}


def errors_of(merge: Merge, clock: Callable[[], float] = time.process_time) -> dict[str, Any]:
    """What a merge took, and how far off it was on its way."""
    host, concepts, options = merge
    seen: list[tuple[float, Progress]] = []
    with ExitStack() as stack:
        stack.enter_context(patch("time.perf_counter", clock))
        stack.enter_context(patch("iteris_core.merge.Eta", lambda told: Eta(told, clock)))
        started = clock()
        result = merge_loras(
            host,
            concepts,
            on_progress=lambda progress: seen.append((clock() - started, progress)),
            **options,
        )
        whole = clock() - started
    off: dict[str, float | None] = {}
    for share in SHARES:
        at, progress = next(pair for pair in seen if pair[0] >= share * whole)
        left = progress.left
        off[f"{share:.0%}"] = None if left is None else round(left / (whole - at) - 1, 3)
    return {"seconds": round(whole, 2), "off": off, "plan": result.report.plan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(MERGES), help=", ".join(MERGES))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = read(FILE)
    for name in arguments.names:
        rounds = [errors_of(MERGES[name]()) for _ in range(arguments.rounds)]
        found[name] = rounds
        print(json.dumps({name: rounds}), flush=True)
        write(FILE, found)


if __name__ == "__main__":
    main()
