"""A method's arguments: the LoRAs' changes, the host, the run's limits and its expected work.

Denoising, the sweep and the steps are forwards of so many rows, and a :class:`StageTiming` says
what one takes, in multiply-adds. A site's moments and solve follow from its shape.
:class:`..progress.Forecast` turns work into time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import cycle, islice
from typing import Any

import torch

from ..activations.lockstep import Lockstep
from ..activations.memory import is_apart
from ..activations.streams import Stream
from ..calibration import Calibration
from ..calibration_prompts import samples_of
from ..concepts import Concept
from ..hosts.protocol import SAMPLES_AT_ONCE, Host, SampleRequest, Stage
from ..hosts.sample_store import SampleStore
from ..lora import SiteChanges
from ..progress import Forecast
from ..settings import Budget
from ..solve.choose import THRESHOLDS, Thresholds
from ..solve.problem import Solution
from .batches import SWEEP, ExecutionConfig, Schedule, limit_of
from .footprint import Step
from .report import MergeReport

_FACTORS = 4.0  # cost of factors and eigenvectors, relative to the same number of products
_SOLVE = 0.3  # a solve's operations, relative to a forward's
_FLOAT32 = 8.0  # cost of a product in float32 on a graphics card, relative to one in a forward
_STEP = 4.0
"""A row's step in forwards: the merge's, the gradients, which in attention take two, and its LoRA's
at first, or its blocks' again where memory is short."""


@dataclass(frozen=True)
class StageTiming:
    """A ``stage`` made with a ``calibration`` after a forward: the sites that it reached, in order,
    as (tokens per row, out, in), and its ``seconds`` per row. A whole ``forward`` is one step. Of
    its seconds, ``fixed_seconds`` do not depend on its rows."""

    stage: Stage
    calibration: Calibration
    sites: Mapping[str, tuple[int, int, int]]
    seconds: float
    device: torch.device
    forward: Step
    fixed_seconds: float = 0.0

    @property
    def products(self) -> int:
        """A row's multiply-adds."""
        return sum(map(math.prod, self.sites.values()))


@dataclass(frozen=True)
class Trace:
    """What a short pass shows of a model (:mod:`.preflight`). ``refused``: site of a job's changes
    → why its features cannot be collected; empty if all can. ``stages``: observations of every
    stage. ``joined``: sites whose inputs have the rows in another dimension than the first.
    ``streams``: the residual streams that the denoisers' forwards show. ``norms``: ‖W0‖_F of every
    layer that a forward reaches."""

    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    stages: Sequence[StageTiming] = ()
    joined: frozenset[str] = frozenset()
    streams: Mapping[str, Stream] = field(default_factory=dict[str, Stream])
    norms: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Job:
    """A merge of ``concepts`` on a ``host``, which a method on weights ignores. ``changes[site]``
    are the LoRAs' changes there, at their strength; ``streams`` are the residual streams to include
    in targets.

    ``tick`` reports progress, and ``eta`` estimates the time left by the ``trace``'s stages.
    Samples may be kept in ``store``. ``rank`` is what the method's settings allow, in a layer or,
    with ``share_ranks``, on average. So many ``steps`` through the denoiser follow. ``included``
    are the LoRAs always on that become part of the merged one. With ``rescues`` a user who cancels
    once there is a merge gets it.
    """

    host: Host
    concepts: Sequence[Concept]
    changes: Mapping[str, SiteChanges]
    calibration: Calibration
    generator: torch.Generator
    tick: Callable[..., None]
    streams: Mapping[str, Stream] = field(default_factory=dict[str, Stream])
    memory_budget: Budget = None
    thresholds: Thresholds = THRESHOLDS
    eta: Forecast = field(default_factory=Forecast)
    trace: Trace = field(default_factory=Trace)
    store: SampleStore | None = None
    rank: int | float | None = None
    share_ranks: bool = False
    steps: int = 0
    included: Sequence[Concept] = ()
    rescues: bool = False
    report: MergeReport = field(default_factory=lambda: MergeReport("", ()))
    """Copies of the job share it."""

    @property
    def weights(self) -> list[float]:
        return [concept.weight for concept in self.concepts]

    @property
    def loras(self) -> int:
        """The number of concepts with a LoRA; the others preserve the base."""
        return sum(concept.lora is not None for concept in self.concepts)

    def largest_rank(self, changes: SiteChanges) -> int:
        """The largest rank that the merged change of a site may have."""
        rank = min(changes.rank, *changes.shape)
        capped = isinstance(self.rank, int) and not self.share_ranks
        return min(rank, int(self.rank or rank)) if capped else rank

    @property
    def denoised(self) -> int:
        """The number of one-row forwards for making samples."""
        calibration = self.calibration
        if calibration.latents == "noise":
            return 0
        steps = calibration.denoising_steps * (2 if calibration.guidance > 1 else 1)
        return self.samples_of(calibration) * steps

    @property
    def denoising_work(self) -> float:
        """The work of making the samples."""
        each = [seen.products for seen in self.trace.stages if seen.stage.spatial]
        return self.denoised * sum(each) / len(each) if each else 0.0

    def at_once(self, most: int, copies: int = 1, *, stage: str = "", factors: int = 0) -> int:
        """How many rows, each in so many ``copies``, a forward of the ``stage`` (empty: of all
        stages seen) may have within the memory budget, beside so many times the changes' float32
        ``factors``: one to ``most``."""
        seen = [one.forward for one in self.trace.stages if stage in ("", one.stage.name)]
        if self.memory_budget is None or not seen:
            return most
        beside = factors * sum(4 * sum(of.shape) * of.rank for of in self.changes.values())
        sizes = [
            beside + max(one.forward + rows * copies * one.running for one in seen)
            for rows in range(1, most + 1)
        ]
        budget = self.memory_budget
        limit = self.host.free_memory(sizes[-1]) if budget == "free" else budget
        return max(sum(size <= limit for size in sizes), 1)

    @property
    def steps_work(self) -> dict[str, float]:
        """Stage → the work of one step through it, for those that are trained."""
        batch = self.thresholds.batch
        return {
            seen.stage.name: _STEP * batch * seen.products
            for seen in self.trace.stages
            if seen.stage.is_denoiser
        }

    def bare(self, what: str, *_: object) -> None:
        """Report ``what``, without the count of a step that is no part of it."""
        self.tick(what, 0, 0)

    def samples_of(self, calibration: Calibration) -> int:
        """The number of samples of all concepts with a LoRA."""
        return sum(samples_of(one, calibration) for one in self.concepts if one.lora is not None)

    @contextmanager
    def run(self) -> Generator[Run]:
        """The model with the changes applied by hooks."""
        copies = 2 if self.calibration.guidance > 1 else 1
        rows = self.at_once(SAMPLES_AT_ONCE, copies, factors=1)
        with Lockstep(self.host.sites(), self.changes, self.streams, self.trace.joined) as lockstep:
            yield Run(self, lockstep, rows)


@dataclass(frozen=True)
class Merged:
    """Every site's solution. ``before`` is the merge without its steps (None: it has none):
    whichever keeps more on held-out rows is the merge. ``ran`` are settings that differ from those
    requested, and ``partial`` says how many steps were taken if not all were. The user ``stopped``
    the merge, and is to get what there is."""

    sites: Mapping[str, Solution]
    before: Merged | None = None
    ran: Mapping[str, Any] = field(default_factory=dict[str, Any])
    partial: str = ""
    stopped: BaseException | None = None


@dataclass
class Run:
    """The base model of a ``job``; runs rows under ``lockstep``. So many samples are denoised
    ``at_once``."""

    job: Job
    lockstep: Lockstep
    at_once: int = SAMPLES_AT_ONCE

    @cached_property
    def samples(self) -> Any:
        """The rows on which features are collected, made once, with each LoRA active."""
        job = self.job
        fields = job.concepts, job.calibration, self.lockstep, job.generator, job.tick, job.store
        return job.host.samples(SampleRequest(*fields, at_once=self.at_once))

    @property
    def ahead(self) -> Run:
        """A run with the same rows, of pure noise, if their samples are still to be denoised;
        otherwise this one."""
        job = self.job
        if "samples" in vars(self) or not (job.denoised and job.host.pictures):
            return self
        generator = torch.Generator()
        generator.set_state(job.generator.get_state())
        calibration = replace(job.calibration, latents="noise")
        tick = partial(job.bare, "planning")
        noise = replace(job, calibration=calibration, generator=generator, tick=tick)
        return Run(noise, self.lockstep)

    def stages(self) -> Iterator[Stage]:
        """The stages in execution order; all rows of one must run before the next is requested."""
        count = self.job.calibration.samples
        for stage in self.job.host.stages(self.samples, self.lockstep.changes.keys()):
            yield replace(stage, samples=count) if stage.samples is None else stage


def sites_work(
    job: Job,
    seen: StageTiming,
    batching: ExecutionConfig,
    schedule: Schedule = SWEEP,
    slower: float = 1.0,
) -> list[tuple[float, float]]:
    """For each of the job's sites in a stage, in order: the work of one pass's forwards from the
    site before, which take ``slower`` times as long, and that of its moments and solve."""

    def count(calibration: Calibration) -> int:
        return job.samples_of(calibration) * (calibration.rows_each if seen.stage.spatial else 1)

    # Roughly the rows seen, as often as there are more samples.
    shown = seen.stage.rows
    rows = round(len(shown) * count(job.calibration) / count(seen.calibration))
    stage = replace(seen.stage, rows=list(islice(cycle(shown), rows)), samples=None)
    limit, slow = limit_of(stage, batching), _FLOAT32 if is_apart(seen.device) else 1.0
    work: list[tuple[float, float]] = []
    way = operations = 0.0
    if seen.seconds:  # a solve's many small operations
        operations = _SOLVE * seen.fixed_seconds * seen.products / seen.seconds
    for site, (length, out, width) in seen.sites.items():
        way += slower * rows * schedule.copies * length * out * width
        if site in job.changes:
            tokens = rows * min(length, limit(width) if limit else length)
            # X̃ᵀX̃ or, with fewer tokens than inputs, X̃X̃ᵀ; its factor; and the target in some
            # output directions.
            few, directions = min(tokens, width), min(out, int(1.25 * job.changes[site].rank) + 32)
            solve = tokens * width * (few + 2 * directions)
            solve += _FACTORS * few * width * (few / 3 + directions)
            work.append((way, slow * solve + operations))
            way = 0.0
    return work
