"""Quality at equal time: SSR-Merge's own core, and ``iteris`` with as few rows as take its seconds.

``SSR_MERGE_PATH=CHECKOUT python benchmarks/equal_time.py [--rounds 3]`` on the toybox, on the sets
of two, five and ten concepts that ``quality.py`` reports, drawn and scored as there, into
``benchmarks/results/equal_time.json``. Their core runs as its authors run it: each LoRA in turn on
the weights, the pipeline on its prompts, and every step's features counted as they come; with the
ridge that is best on the tuning pairs (``quality.TUNED``). Once with 50 prompts of ten steps, as
many as a merge of ours has by default; of one prompt of one step, as its authors' own script has
it, only the seconds are taken, which no merge of ours keeps.

The prompts that ``iteris`` may have are found by timing it with few and with more; then both run
again, and fewer prompts are taken until the median is no longer than theirs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from outputs import result_file, write
from quality import SETS, TUNED, Scores, row_of
from toybox_world import World

from iteris_core import Calibration, Lora, LowRank, merge_loras
from iteris_core.calibration_prompts import concept_prompts
from toybox import TEMPLATES

FILE = result_file("equal_time.json")
SIZES = ("2", "5", "10")
TIMESTEPS = 4
"""The default; fewer of more prompts are worse at as many forwards (``heldout_error.py``)."""
_BATCH = 32


@dataclass(frozen=True)
class Budget:
    """What SSR-Merge's core has: prompts a LoRA, and denoising steps of each."""

    prompts: int
    steps: int


FULL, SCRIPT = Budget(50, 10), Budget(1, 1)


class Contenders:
    def __init__(self, world: World, core: Any) -> None:
        self.world, self.core = world, core

    def ssr(self, numbers: Sequence[int], budget: Budget) -> Lora:
        world = self.world
        concepts = world.merged_concepts(numbers, None, 0.0)
        loras = [concept.lora for concept in concepts if concept.lora is not None]
        pairs = [{s: (c.down, c.up) for s, c in lora.sites.items()} for lora in loras]
        merger = self.core.SSRMerger(pairs, lambda_reg=TUNED["ssr"]["ridge"])
        modules = world.host.sites()
        generator = torch.Generator().manual_seed(0)
        calibration = Calibration(samples=budget.prompts, templates=TEMPLATES)
        for index, (concept, lora) in enumerate(zip(concepts, loras, strict=True)):
            prompts = concept_prompts(concept, calibration, generator)
            with world.changed(lora):
                merger.attach({site: modules[site] for site in lora.sites})
                merger.set_active_task(index)
                for start in range(0, len(prompts), _BATCH):
                    world.pipeline(
                        prompts[start : start + _BATCH],
                        num_inference_steps=budget.steps,
                        guidance_scale=1.0,
                        generator=generator,
                        output_type="latent",
                    )
                merger.detach()
        return Lora({site: LowRank(up, down) for site, (down, up) in merger.solve().items()}, "ssr")

    def iteris(self, numbers: Sequence[int], prompts: int, timesteps: int = TIMESTEPS) -> Lora:
        calibration = Calibration(samples=prompts, timesteps=timesteps, templates=TEMPLATES)
        concepts = self.world.merged_concepts(numbers, None, 0.0)
        return merge_loras(self.world.host, concepts, calibration=calibration).lora

    def scores(self, numbers: Sequence[int], lora: Lora) -> Scores:
        pictures = self.world.pictures(numbers)
        return self.world.score(pictures, self.world.draw(lora, pictures))


def seconds_of(run: Callable[[], Any], rounds: int) -> float:
    """The median of this thread's CPU seconds, with which other work does not interfere much."""
    taken: list[float] = []
    for _ in range(rounds):
        started = time.thread_time()
        run()
        taken.append(time.thread_time() - started)
    return median(taken)


def equal(
    contenders: Contenders, numbers: Sequence[int], budget: Budget, rounds: int
) -> tuple[int, dict[str, float]]:
    """How many prompts ``iteris`` may have (1 at least), and the seconds of both with them."""

    def ours(prompts: int) -> float:
        return seconds_of(lambda: contenders.iteris(numbers, prompts), rounds)

    theirs = seconds_of(lambda: contenders.ssr(numbers, budget), rounds)
    few, more = 4, 16
    least, most = ours(few), ours(more)
    each = (most - least) / (more - few)
    prompts = max(1, int(few + (theirs - least) / each))
    while True:
        found = {
            "iteris": ours(prompts),
            "ssr": seconds_of(lambda: contenders.ssr(numbers, budget), rounds),
        }
        over = found["iteris"] - found["ssr"]
        if over <= 0 or prompts == 1:
            return prompts, found
        prompts = max(1, prompts - max(1, round(over / each)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    contenders = Contenders(World(), _core())
    data: dict[str, Any] = {}
    for size in SIZES:
        sets = SETS[size]
        prompts, least = equal(contenders, sets[0], SCRIPT, rounds)
        data[size] = {"its authors' script": {"prompts": prompts, "seconds": least}}
        prompts, seconds = equal(contenders, sets[0], FULL, rounds)
        merges = {
            "ssr": lambda numbers: contenders.ssr(numbers, FULL),
            "iteris": lambda numbers, prompts=prompts: contenders.iteris(numbers, prompts),
        }
        scores = {
            method: [contenders.scores(numbers, merge(numbers)) for numbers in sets]
            for method, merge in merges.items()
        }
        leads = [_difference(*pair) for pair in zip(*scores.values(), strict=True)]
        rows = {method: row_of(some) for method, some in {**scores, "lead": leads}.items()}
        data[size] |= {
            "prompts": prompts,
            "timesteps": TIMESTEPS,
            "seconds": seconds,
            **{m: {c: stat.to_dict() for c, stat in row.items()} for m, row in rows.items()},
        }
        print(size, f"{prompts} prompts", seconds, data[size]["its authors' script"])
        for method, row in rows.items():
            cells = "  ".join(f"{column} {stat}" for column, stat in row.items())
            print(f"  {method:8}{cells}", flush=True)
        write(FILE, data)


def _difference(theirs: Scores, ours: Scores) -> Scores:
    return {
        column: {seed: value - theirs[column][seed] for seed, value in values.items()}
        for column, values in ours.items()
    }


def _core() -> Any:
    path = Path(os.environ["SSR_MERGE_PATH"]) / "ssr_merge" / "core.py"
    spec = importlib.util.spec_from_file_location("ssr_merge_core", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
