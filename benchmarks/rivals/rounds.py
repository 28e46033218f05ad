"""Rounds of Mix-of-Show and LoRACLR, as in their code: text encoders, keys and values, the rest.

In each the model has the layers of the rounds before merged, for every LoRA alike, and those of the
rounds to come as the base has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import replace

import torch

from iteris_core.passes.batches import ExecutionConfig, Schedule
from iteris_core.passes.changes import added
from iteris_core.passes.job import Job, Merged
from iteris_core.passes.sweep import Passes
from iteris_core.solve.problem import Solution, StageSolver


def reads_text(site: str) -> bool:
    """True if nothing but the prompt reaches the site."""
    return _encodes(site) or site.endswith(("attn2.to_k", "attn2.to_v"))


def in_rounds(
    job: Job, solver: StageSolver, batching: ExecutionConfig, schedule: Schedule
) -> Merged:
    """Every site's solution by ``solver``; each round has the same random numbers."""
    solved: dict[str, Solution] = {}
    merged, state = Merged({}), job.generator.get_state()
    for part in _rounds(job):
        generator = torch.Generator()
        generator.set_state(state)
        calibration = job.calibration
        if all(map(reads_text, part)):  # whatever the picture
            calibration = replace(calibration, latents="noise")
        changes = {site: some for site, some in job.changes.items() if site in part}
        this = replace(job, changes=changes, generator=generator, calibration=calibration)
        before = {site: solution.change for site, solution in solved.items()}
        with added(job.host, before), this.run() as run:
            merged = Passes(run, lambda _: solver, batching, schedule).solve()
        solved |= merged.sites
    return replace(merged, sites={site: solved[site] for site in job.changes})


def _rounds(job: Job) -> Iterator[Set[str]]:
    encoders = {site for site in job.changes if _encodes(site)}
    texts = {site for site in job.changes if reads_text(site)} - encoders
    yield from filter(None, (encoders, texts, job.changes.keys() - encoders - texts))


def _encodes(site: str) -> bool:
    return site.startswith("text_encoder")
