"""A short pass before a merge: finds sites that no forward reaches, and sites that mix rows.

Every stage runs a row or two of pure noise, with no LoRA active. Otherwise these problems would
show only at the end, after minutes or hours.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.host_pool import wait_for
from ..activations.lockstep import Lockstep
from ..activations.streams import Stream, find_streams
from ..architectures.sites import weight_shape
from ..concepts import Concept
from ..hosts.protocol import Stage
from .job import Job, SiteCost, StageTiming
from .joined_rows import joined_rows

UNREACHED = "is reached by no forward"
PARTLY = 'is reached by some of the prompts only, which schedule="jacobi" of iteris takes'
MIXED = "gets the rows of a batch mixed or split"
REPEATED = 'is called more than once in a forward, which schedule="jacobi" of iteris takes'


@dataclass(frozen=True)
class PreflightResult:
    """``refused``: site of a job's changes → why its features cannot be collected; empty if all
    can. ``stages``: observations of every stage. ``joined``: sites whose inputs have the rows in
    another dimension than the first. ``streams``: what the denoisers' forwards show of them."""

    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    stages: Sequence[StageTiming] = ()
    joined: frozenset[str] = frozenset()
    streams: Mapping[str, Stream] = field(default_factory=dict[str, Stream])


def unmergeable_sites(job: Job, *, sweep: bool) -> PreflightResult:
    """Why sites of the job's changes cannot be merged, by a ``sweep`` or otherwise.

    A separate generator keeps the merge's random draws independent of this pass. Text models are
    skipped: their rows may be available only once, and all their layers are reached.
    """
    host, calibration, sites = job.host, job.calibration, job.changes.keys()
    if not host.pictures:
        return PreflightResult()
    short = replace(calibration, samples=1, timesteps=calibration.denoising_steps, latents="noise")
    generator = torch.Generator().manual_seed(calibration.seed)
    modules, seen = host.sites(), list[StageTiming]()

    def quiet(what: str, done: int, total: int) -> None:
        job.tick("checking the sites", 0, 0)

    found: dict[str, str | None] = {}
    joined: set[str] = set()
    streams: dict[str, Stream] = {}
    # Some layers need words that one prompt may lack, such as text in quotes.
    every_prompt = replace(short, samples=calibration.samples, timesteps=1)
    with Lockstep({}, {}) as lockstep, torch.no_grad():
        for some in (short, every_prompt):
            samples = host.samples(job.concepts, sites, some, lockstep, generator, quiet)
            for stage in host.stages(samples, sites):
                every_kind = some is every_prompt
                why, mixed, calls = _look(stage, modules, every_kind=every_kind, sweep=sweep)
                if mixed - joined:
                    joined |= joined_rows(stage, {site: modules[site] for site in mixed - joined})
                found |= why | dict.fromkeys(mixed - joined, MIXED)
                if not every_kind:
                    seen.append(
                        StageTiming(stage, some, calls.reached, calls.seconds, calls.device)
                    )
                    streams |= _streams(stage, modules)
            if sites <= found.keys() and MIXED not in found.values():
                break
    why_not = {s: why for s in sites if (why := found.get(s, UNREACHED)) is not None}
    return PreflightResult(why_not, seen, frozenset(joined - why_not.keys()), streams)


def _look(
    stage: Stage, modules: Mapping[str, nn.Module], *, every_kind: bool, sweep: bool
) -> tuple[dict[str, str | None], set[str], _Calls]:
    """The sites that ``stage`` reaches with its first row, or with the first row of every kind, why
    they cannot be merged, those that get a different number of rows, and the last row's calls."""
    kinds = stage.batch_keys if stage.batch_keys and every_kind else [None] * len(stage.concept_ids)
    firsts = {kind: row for row, kind in reversed(list(enumerate(kinds)))}.values()
    calls = _Calls(set(stage.sites))
    count: Counter[str] = Counter()
    mixed: set[str] = set()
    repeated: set[str] = set()
    with ExitStack() as stack:
        for site, module in modules.items():
            stack.enter_context(module.register_forward_hook(calls.hook(site)))
        for row in firsts:
            for _ in range(1 if every_kind else 2):  # the first one may load weights to the device
                calls.rows.clear()
                started = time.perf_counter()
                stage.run([row, row], 1)
                wait_for(calls.device)
                calls.seconds = (time.perf_counter() - started) / 2
            count.update(calls.rows.keys())
            mixed |= {site for site, rows in calls.rows.items() if set(rows) != {2}}
            repeated |= {site for site, rows in calls.rows.items() if len(rows) > 1}
    for row in set(range(len(stage.concept_ids))) - set(firsts) if stage.feeds_next else ():
        stage.run([row], 1)
    why: dict[str, str | None] = dict.fromkeys(count)
    if sweep:
        why |= {site: PARTLY for site, reached in count.items() if reached < len(firsts)}
        why |= dict.fromkeys(repeated, REPEATED)
    return why, mixed, calls


def _streams(stage: Stage, modules: Mapping[str, nn.Module]) -> dict[str, Stream]:
    """From two rows of one kind that are far apart in time."""
    if not stage.spatial or not stage.concept_ids:
        return {}
    kinds = stage.batch_keys or [None] * len(stage.concept_ids)
    rows = [row for row, kind in enumerate(kinds) if kind == kinds[0]]
    return find_streams(lambda: stage.run([rows[0], rows[-1]], 1), 2, modules)


class _Calls:
    """The calls of a forward: every site that it ``reached``, the ``rows`` of each call for the
    selected sites, and its ``seconds`` per row."""

    def __init__(self, wanted: Set[str]) -> None:
        self.rows: dict[str, list[int]] = {}
        self.reached: dict[str, SiteCost] = {}
        self.device, self.seconds = torch.device("cpu"), 0.0
        self._wanted = wanted

    def hook(self, site: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            out, *rest = weight_shape(module)
            if site in self._wanted:
                self.rows.setdefault(site, []).append(len(args[0]))
            tokens = output.numel() // max(out * len(output), 1)
            self.reached[site] = SiteCost((out, math.prod(rest)), tokens)
            self.device = output.device

        return hook


def complaint(
    found: Mapping[str, str], concepts: Sequence[Concept], *, refused: bool = True
) -> str:
    """The message about sites that cannot be merged: where, from which file, and what to do."""
    parts: list[str] = []
    for why, count in Counter(found.values()).items():
        site = min(name for name, reason in found.items() if reason == why)
        files = [
            concept.lora.source or concept.lora.name
            for concept in concepts
            if concept.lora is not None and site in concept.lora.sites
        ]
        parts.append(f"{count} sites, such as {site} (in {', '.join(files)}): it {why}")
    text = "; ".join(parts)
    if not refused:
        return text
    return (
        f"{len(found)} of the LoRAs' layers cannot be merged by their features: {text}. Give the "
        "model the input that these layers need (an image, a first frame, a control), leave them "
        "out, or give them the mean of the LoRAs' changes (unmergeable: skip or mean)."
    )
