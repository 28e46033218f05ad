"""SSR-Merge's own code, RegMean++ and IterIS on the same base, LoRAs and rows, in one run.

``SSR_MERGE_PATH=… python benchmarks/side_by_side.py --world emoji``, or ``sd15``: its architecture
at full size with random weights and LoRAs, at 256 pixels. Each contender merges the denoiser's
LoRAs in a process of its own. CPU seconds, ``forwards`` (of one row) and ``peak`` (GiB
that the process grows by) are the merge's own, without the search before it and the held-out rows
after it. Kept is 1 − ‖f_merged − f_LoRA‖² / ‖f_base − f_LoRA‖² of the final outputs f on
held-out rows, the mean over the LoRAs, at strength 1 (``kept``) and in other uses (``others``).
SSR-Merge's core runs as its authors' runner does: each LoRA in turn on the weights, one forward of
its rows, then their solve. Writes ``results/side_by_side.json``; finished contenders are kept.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import runpy
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import rivals  # noqa: F401 (registers them)
import torch
from ladder import RUNGS, counted
from outputs import read, result_file, rounded, write
from protocol.emoji import EmojiWorld
from speed.models import denoiser_only, prompt_concepts, sd15_host

from iteris_core import Concept, merge_loras
from iteris_core.lora import LowRank
from iteris_core.methods import registry
from iteris_core.methods.linear import LinearSettings
from iteris_core.methods.registry import Fit, on_model
from iteris_core.passes.batches import chunks
from iteris_core.passes.job import Job, Merged
from iteris_core.solve.problem import Solution

LORAS = {"emoji": 5, "sd15": 2}
CONTENDERS = [
    f"{method}@{rung}"
    for rung in ("least", "fast", "default")
    for method in ("ssr-merge", "regmean++", "iteris")
]
"""Methods, and whose rows they get."""
AT_ONCE = 32


@on_model("ssr-merge", LinearSettings)
def ssr_merge(job: Job, settings: LinearSettings) -> Merged:
    """SSR-Merge by its authors' code (arXiv 2606.10617), with its own ridge."""
    core = runpy.run_path(str(Path(os.environ["SSR_MERGE_PATH"]) / "ssr_merge" / "core.py"))
    own = [
        {site: of for site, some in job.changes.items() if (of := some.by_concept[index])}
        for index, concept in enumerate(job.concepts)
        if concept.lora is not None
    ]
    merger = core["SSRMerger"]([{s: (c.down, c.up) for s, c in of.items()} for of in own])
    modules = job.host.sites()
    with torch.no_grad(), job.run() as run:
        samples = run.samples
        run.lockstep.close()
        *before, denoiser = job.host.stages(samples, job.changes.keys())
        for stage in before:
            stage.forward(stage.rows, 1)
        for index, changes in enumerate(own):
            merger.attach({site: modules[site] for site in changes})
            merger.set_active_task(index)
            kept = {site: modules[site].weight.clone() for site in changes}
            for site, change in changes.items():
                modules[site].weight.addmm_(change.up, change.down)
            rows = [row for row in denoiser.rows if row.concept == index]
            for some in chunks(range(len(rows)), [row.key for row in rows], AT_ONCE):
                denoiser.forward([rows[at] for at in some], 1)
            for site, weight in kept.items():
                modules[site].weight.copy_(weight)
            merger.detach()
    found = merger.solve()
    return Merged({site: Solution(LowRank(up, down)) for site, (down, up) in found.items()})


@cache
def loaded(world: str) -> tuple[Any, Sequence[Concept], dict[str, Any]]:
    """The host, the concepts and their calibration."""
    if world == "emoji":
        emoji = EmojiWorld()
        concepts = emoji.concepts(emoji.subjects[: LORAS[world]], 0)
        return emoji.host, [denoiser_only(concept) for concept in concepts], emoji.half
    host = sd15_host()
    concepts = prompt_concepts(host, LORAS[world], 16)
    return host, [denoiser_only(concept) for concept in concepts], {"latent_size": 32}


def measured(world: str, contender: str) -> dict[str, Any]:
    host, concepts, calibration = loaded(world)
    name, _, rung = contender.partition("@")
    method, spent = registry.find_method(name), dict[str, float]()

    @contextmanager
    def timed(job: Job, settings: Any) -> Generator[Fit]:
        began, pages = time.process_time(), int(Path("/proc/self/statm").read_text().split()[1])
        with counted(host.pipeline) as rows, method.prepare(job, settings) as fit:
            merged = fit.merge()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages * 4096
        spent.update(forwards=sum(rows), seconds=time.process_time() - began, peak=grown / 2**30)
        yield Fit(lambda: merged)

    registry._METHODS[name] = replace(method, prepare=timed)
    settings = RUNGS[rung].settings if name == "iteris" else None
    calibration = {"seed": 0, **calibration, **RUNGS[rung].calibration}
    result = merge_loras(host, concepts, name, settings=settings, calibration=calibration)
    kept = {use: fmean(shares) for use, shares in result.report.kept.items()}
    return {**spent, "kept": kept.pop("1"), "others": fmean(kept.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=LORAS, default="emoji")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    given = parser.parse_args()
    path = result_file("side_by_side.json")
    loaded(given.world)
    for contender in given.contenders.split(","):
        runs = read(path).get(given.world, {})
        if contender in runs:
            continue
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found = rounded(pool.apply(measured, (given.world, contender)))
        write(path, {**read(path), given.world: {**runs, contender: found}})
        print(given.world, contender, found, flush=True)


if __name__ == "__main__":
    main()
