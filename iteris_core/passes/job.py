"""What a method gets: the LoRAs' changes, the host, and what the run is to keep to."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..activations.lockstep import Lockstep
from ..activations.processes import ALONE, Processes
from ..concepts import Calibration, Concept
from ..errors import SolveError
from ..hosts.protocol import DENOISING, Host, Stage
from ..lora import SiteChanges
from ..solve.choose import POLICY, Policy
from ..solve.problem import Begin, Bytes, Reduction, Solution
from .eta import Eta

Budget = int | Literal["free"] | None
"""Bytes beyond the model (``"free"``: what is free; None: no limit)."""


@dataclass(frozen=True)
class RunLog:
    """What a run reports of itself: how many ``rows`` it had, how each stage kept to the memory
    (``short``: those of which rows were left out), the largest relative change of a site in each
    Jacobi iteration but the first, and ``notes``."""

    rows: int = 0
    plan: Sequence[str] = ()
    short: Sequence[str] = ()
    convergence: Sequence[float] = ()
    notes: Sequence[str] = ()

    def with_notes(self, notes: Sequence[str]) -> RunLog:
        return replace(self, notes=[*self.notes, *notes])


@dataclass(frozen=True)
class StageSolver:
    """What a method does at the sites of a stage.

    ``begin`` makes a site's reduction, with moments in ``dtype``, and ``solve`` turns it into its
    change; ``bytes`` is what both take at a site, for the plan (``sweep``: whether forwards wait).
    ``acting`` and ``inputs`` are as for :class:`..activations.collect.Collector`.
    """

    begin: Begin
    solve: Callable[[str, Reduction], Solution]
    bytes: Callable[[str, bool], Bytes]
    dtype: torch.dtype = torch.float32
    acting: Set[str] = frozenset()
    inputs: Mapping[str, Tensor] | None = None

    def solved(self, site: str, reduction: Reduction) -> Solution:
        """``solve``, with the site's name in what it may raise."""
        try:
            return self.solve(site, reduction)
        except SolveError as error:
            raise SolveError(f"Site {site}: {error}") from error


@dataclass(frozen=True)
class Job:
    """A merge that runs the base model. ``changes[site]`` are the LoRAs' there, at their strength,
    and ``streams`` the host's residual streams that a target is to hold.

    ``processes`` says which rows are this process's. ``policy`` holds the thresholds. ``tick``
    reports progress, and ``eta`` the time that is left.
    """

    host: Host
    concepts: Sequence[Concept]
    changes: Mapping[str, SiteChanges]
    calibration: Calibration
    generator: torch.Generator
    tick: Callable[..., None]
    streams: Mapping[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    processes: Processes = ALONE
    memory_budget: Budget = None
    policy: Policy = POLICY
    eta: Eta = field(default_factory=Eta)

    @property
    def weights(self) -> list[float]:
        return [concept.weight for concept in self.concepts]

    @property
    def loras(self) -> int:
        """How many concepts have a LoRA; the others keep the base as it is."""
        return sum(concept.lora is not None for concept in self.concepts)

    @contextmanager
    def run(self) -> Generator[Run]:
        """The model with the changes on it."""
        calibration, denoised = self.calibration, 0
        if calibration.latents == "denoising":
            denoised = self.loras * calibration.samples * calibration.denoising_steps
            denoised *= 2 if calibration.guidance > 1 else 1
        with Lockstep(self.host.sites(), self.changes, self.streams, self.processes) as lockstep:

            def samples() -> Any:
                sites = set(lockstep.changes)
                return self.host.samples(
                    self.concepts, sites, calibration, lockstep, self.generator, self.tick
                )

            yield Run(
                self.host,
                lockstep,
                samples,
                calibration.samples,
                denoised,
                self.memory_budget,
                self.tick,
                self.eta,
            )


@dataclass
class Run:
    """A base model that runs rows under ``lockstep``. ``make`` makes their samples, so many of each
    concept, by ``denoised`` forwards of a row."""

    host: Host
    lockstep: Lockstep
    make: Callable[[], Any]
    samples_each: int
    denoised: int
    memory_budget: Budget
    tick: Callable[..., None]
    eta: Eta

    @cached_property
    def samples(self) -> Any:
        """The rows on which features are collected, made once, with each LoRA active."""
        samples = self.make()
        self.eta.forecast.drop(DENOISING)  # which an application may have remembered
        return samples

    def stages(self) -> Iterator[Stage]:
        """In execution order; all rows of one must have run before the next is asked for."""
        for stage in self.host.stages(self.samples, set(self.lockstep.changes)):
            yield replace(stage, samples=self.samples_each) if stage.samples is None else stage


@dataclass
class WeightJob:
    """A merge that looks at weights alone. ``changes[site]`` are the LoRAs' there."""

    changes: Mapping[str, SiteChanges]
    weights: Sequence[float]
    generator: torch.Generator
    tick: Callable[..., None]
