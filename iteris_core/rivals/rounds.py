"""Rounds of Mix-of-Show and LoRACLR, as in their code: text encoders, keys and values, the rest.

In each the model has the layers of the rounds before merged, for every LoRA alike, and those of the
rounds to come as the base has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..errors import DeviceError
from ..lora import SiteChanges
from ..methods.registry import Merged
from ..passes.batches import ExecutionConfig, Schedule
from ..passes.job import Job, RunLog
from ..passes.sweep import solve_sites
from ..solve.problem import (
    Bytes,
    Reduction,
    RegressionSpec,
    SiteContext,
    Solution,
    StageSolver,
    Tokens,
)


def reads_text(site: str) -> bool:
    """True if nothing but the prompt reaches the site."""
    return _encodes(site) or site.endswith(("attn2.to_k", "attn2.to_v"))


def in_rounds(
    job: Job, solver: StageSolver, batching: ExecutionConfig, schedule: Schedule
) -> Merged:
    """Every site's solution by ``solver``; each round has the same random numbers. Raises
    :class:`DeviceError` in several processes."""
    if job.processes.size > 1:
        raise DeviceError("A merge in rounds runs in one process; start only one.")
    solved: dict[str, Solution] = {}
    log, state = RunLog(), job.generator.get_state()

    def begin(opening: SiteContext) -> Reduction:
        changes = opening.changes
        return _Nothing(changes) if isinstance(changes, _Merged) else solver.begin(opening)

    def solve(site: str, reduction: Reduction) -> Solution:
        return solved.get(site) or solver.solve(site, reduction)

    def bytes_of(site: str, sweep: bool) -> Bytes:
        return Bytes(0, 0) if site in solved else solver.bytes(site, sweep)

    own = replace(solver, begin=begin, solve=solve, bytes=bytes_of)
    for part in _rounds(job):
        changes = {
            site: _Merged((solved[site].change,) * len(some)) if site in solved else some
            for site, some in job.changes.items()
            if site in solved or site in part
        }
        generator = torch.Generator()
        generator.set_state(state)
        calibration = job.calibration
        if all(map(reads_text, part)):  # whatever the picture
            calibration = replace(calibration, latents="noise")
        this = replace(job, changes=changes, generator=generator, calibration=calibration)
        with this.run() as run:
            found, log = solve_sites(run, lambda _: own, batching, schedule)
        solved |= found
    return Merged({site: solved[site] for site in job.changes}, log)


class _Merged(SiteChanges):
    """The merged change of a site, as every LoRA's."""


class _Nothing(Reduction):
    """Of a site that is solved."""

    def add(self, tokens: Tokens) -> None:
        return

    def solve(self, fit: RegressionSpec) -> Solution:
        return Solution(self.changes.like)


def _rounds(job: Job) -> Iterator[set[str]]:
    encoders = {site for site in job.changes if _encodes(site)}
    texts = {site for site in job.changes if reads_text(site)} - encoders
    yield from filter(None, (encoders, texts, job.changes.keys() - encoders - texts))


def _encodes(site: str) -> bool:
    return site.startswith("text_encoder")
