"""SSR-Merge's own code, RegMean++, Chain of Merges and IterIS on the same LoRAs, in one run.

``SSR_MERGE_PATH=… python benchmarks/side_by_side.py``, of the emoji, on a model that gates. Each
contender merges the denoiser's LoRAs in a process of its own, on the prompts of a rung of the
ladder; rivals have no rows under other uses. CPU seconds, ``forwards`` (of one row) and
``peak`` (GiB that the process grows by) are the merge's own, without what precedes and follows it.
Kept is 1 − ‖f_merged − f_LoRA‖² / ‖f_base − f_LoRA‖² of the final outputs f, the mean over the
LoRAs, at strength 1 (``kept``) and in other uses (``others``), on held-out rows of a default merge
for all, whose words none of its rows has.
SSR-Merge's core runs as its authors' runner does: each LoRA in turn on the weights, one forward of
its rows, then their solve. Writes ``results/side_by_side.json``; finished contenders are kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import runpy
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import rivals  # noqa: F401 (registers them)
import torch
from ladder import RUNGS, counted
from outputs import asked, once, result_file
from protocol.plan import Unit
from speed.models import denoiser_only
from worlds import WORLDS

from iteris_core import Calibration, merge
from iteris_core.lora import LowRank
from iteris_core.methods import registry
from iteris_core.methods.linear import LinearSettings
from iteris_core.methods.registry import Fit, on_model
from iteris_core.passes.batches import chunks
from iteris_core.passes.held_out import kept
from iteris_core.passes.job import Job, Merged
from iteris_core.solve.problem import Solution

METHODS = {
    "ssr-merge:conditions=0": ("least", "fast", "default"),
    "regmean++:conditions=0": ("least", "fast", "default"),
    "chain-of-merges:conditions=0": ("least", "fast", "default"),
    "iteris": ("least", "fast", "default", "best"),
}
"""Methods, and the rungs of the ladder whose prompts they get."""
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


WORLD = "emoji"


@cache
def loaded() -> Any:
    return WORLDS[WORLD]()


def measured(size: int, contender: str, rung: str) -> dict[str, Any]:
    world, how = loaded(), Unit.parsed(contender)
    concepts = [denoiser_only(one) for one in world.concepts(world.subjects[:size], 0)]
    method, spent = registry.find_method(how.method), dict[str, float]()

    @contextmanager
    def timed(job: Job, settings: Any) -> Generator[Fit]:
        began, pages = time.process_time(), int(Path("/proc/self/statm").read_text().split()[1])
        with counted(world.pipeline) as rows, method.prepare(job, settings) as fit:
            merged = fit.merge()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages * 4096
        spent.update(forwards=sum(rows), seconds=time.process_time() - began, peak=grown / 2**30)
        default = Calibration(seed=0, **world.half).settled(size, pictures=True)
        changes = {site: solution.change for site, solution in merged.sites.items()}
        alone = [concept for concept in job.concepts if concept.lora is not None]
        (of,) = kept(replace(job, concepts=alone, calibration=default), changes)
        shares = {use: fmean(of_loras) for use, of_loras in of.items()}
        spent.update(kept=shares.pop("1"), others=fmean(shares.values()))
        yield Fit(lambda: merged)

    registry._METHODS[how.method] = replace(method, prepare=timed)
    merge._better = lambda job, merged: (merged, {})  # on other rows for other calibrations
    merge.merge_loras(
        world.host,
        concepts,
        how.method,
        settings=RUNGS[rung].settings if how.method == "iteris" else None,
        calibration={"seed": 0, **world.half, **RUNGS[rung].calibration, **how.calibration},
    )
    return spent


def in_a_process(*how: Any) -> dict[str, Any]:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measured, how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="2,5,8")
    parser.add_argument("--rungs", default="least,fast,default,best")
    given = asked(parser)
    loaded()
    for size in map(int, given.sizes.split(",")):
        for rung in given.rungs.split(","):
            for method in (method for method, rungs in METHODS.items() if rung in rungs):
                key = json.dumps([WORLD, size, rung, method])
                alone = partial(in_a_process, size, method, rung)
                once(result_file("side_by_side.json"), key, given.until, alone)


if __name__ == "__main__":
    main()
