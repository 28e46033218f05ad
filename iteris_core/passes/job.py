"""A method's arguments: the LoRAs' changes, the host, and the run's limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from ..activations.lockstep import Lockstep
from ..activations.streams import Stream
from ..calibration_prompts import samples_of
from ..concepts import Calibration, Concept
from ..hosts.protocol import Host, Stage
from ..lora import SiteChanges
from ..progress import Forecast
from ..solve.choose import THRESHOLDS, Thresholds

Budget = int | Literal["free"] | None
"""Bytes beyond the model (``"free"``: what is free; None: no limit)."""


@dataclass(frozen=True)
class RunLog:
    """The log of a run: its number of ``rows``, each stage's memory plan (``short``: those with
    rows left out), the largest relative change of a site in each Jacobi iteration after the first,
    and ``notes``."""

    rows: int = 0
    plan: Sequence[str] = ()
    short: Sequence[str] = ()
    convergence: Sequence[float] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class SiteCost:
    """A site in a forward: (out, in), and ``tokens`` per row."""

    shape: tuple[int, int]
    tokens: int

    @property
    def products(self) -> int:
        """A row's multiply-adds."""
        return self.tokens * math.prod(self.shape)


@dataclass(frozen=True)
class StageTiming:
    """A ``stage`` made with a ``calibration`` after a forward: the sites that it reached, in order,
    and its ``seconds`` per row."""

    stage: Stage
    calibration: Calibration
    sites: Mapping[str, SiteCost]
    seconds: float
    device: torch.device

    @property
    def products(self) -> int:
        """A row's multiply-adds."""
        return sum(reached.products for reached in self.sites.values())


@dataclass(frozen=True)
class Job:
    """A merge of ``concepts`` on a ``host``, which a method on weights ignores. ``changes[site]``
    are the LoRAs' changes there, at their strength; ``streams`` are the residual streams to include
    in targets, ``found_streams`` those that a forward showed.

    ``tick`` reports progress, and ``eta`` estimates the time left by the stages ``seen``.
    ``joined``: see :class:`~.preflight.PreflightResult`. With ``only_plans``,
    :func:`~.sweep.solve_sites` raises :class:`~.plan.Planned` once it has planned.
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
    seen: Sequence[StageTiming] = ()
    joined: frozenset[str] = frozenset()
    found_streams: Mapping[str, Stream] = field(default_factory=dict[str, Stream])
    only_plans: bool = False

    @property
    def weights(self) -> list[float]:
        return [concept.weight for concept in self.concepts]

    @property
    def loras(self) -> int:
        """The number of concepts with a LoRA; the others preserve the base."""
        return sum(concept.lora is not None for concept in self.concepts)

    @property
    def denoised(self) -> int:
        """The number of one-row forwards for making samples."""
        calibration = self.calibration
        if calibration.latents == "noise":
            return 0
        steps = calibration.denoising_steps * (2 if calibration.guidance > 1 else 1)
        return self.samples_of(calibration) * steps

    def samples_of(self, calibration: Calibration) -> int:
        """The number of samples of all concepts with a LoRA."""
        return sum(samples_of(one, calibration) for one in self.concepts if one.lora is not None)

    @contextmanager
    def run(self) -> Generator[Run]:
        """The model with the changes applied by hooks."""
        with Lockstep(self.host.sites(), self.changes, self.streams, self.joined) as lockstep:
            yield Run(self, lockstep)


@dataclass
class Run:
    """The base model of a ``job``; runs rows under ``lockstep``."""

    job: Job
    lockstep: Lockstep

    @cached_property
    def samples(self) -> Any:
        """The rows on which features are collected, made once, with each LoRA active."""
        job, sites = self.job, self.lockstep.changes.keys()
        return job.host.samples(
            job.concepts, sites, job.calibration, self.lockstep, job.generator, job.tick
        )

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

        def quiet(what: str, done: int, total: int) -> None:
            job.tick("planning", 0, 0)

        noise = replace(job, calibration=calibration, generator=generator, tick=quiet)
        return Run(noise, self.lockstep)

    def stages(self) -> Iterator[Stage]:
        """The stages in execution order; all rows of one must run before the next is requested."""
        count = self.job.calibration.samples
        for stage in self.job.host.stages(self.samples, self.lockstep.changes.keys()):
            yield replace(stage, samples=count) if stage.samples is None else stage
