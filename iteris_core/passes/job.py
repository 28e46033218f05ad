"""What a method gets: the LoRAs' changes, the host, and what the run is to keep to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..activations.lockstep import Lockstep
from ..activations.processes import ALONE, Processes
from ..concepts import Calibration, Concept
from ..hosts.protocol import Host, Tick
from ..lora import SiteChanges
from ..solve.choose import POLICY, Policy
from .outlook import Outlook


@dataclass
class Ran:
    """What a run tells of itself: how many ``rows`` it had, how each stage kept to the memory, the
    largest relative change of a site in each Jacobi iteration but the first, and ``notes``."""

    rows: int = 0
    plan: list[str] = field(default_factory=list[str])
    convergence: list[float] = field(default_factory=list[float])
    notes: list[str] = field(default_factory=list[str])


@dataclass
class Job:
    """A merge that runs the base model. ``changes[site]`` are the LoRAs' there, at their strength.

    A method may add sites to ``changes``, said in ``repairs`` with those of their inputs that may
    be used (None: all), and the host's ``streams``. ``processes`` says which rows are this
    process's. ``memory_budget`` is in bytes beyond the model (``"free"``: what is free; None: no
    limit). ``policy`` holds the thresholds. ``ran`` is what the run tells of itself, and
    ``outlook`` the time that it has before it.
    """

    host: Host
    concepts: Sequence[Concept]
    changes: Mapping[str, SiteChanges]
    calibration: Calibration
    generator: torch.Generator
    tick: Tick
    repairs: Mapping[str, Tensor | None] = field(default_factory=dict[str, Any])
    streams: Mapping[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    processes: Processes = ALONE
    memory_budget: int | Literal["free"] | None = None
    policy: Policy = POLICY
    ran: Ran = field(default_factory=Ran)
    outlook: Outlook = field(default_factory=Outlook)
    _samples: Any = None

    def __post_init__(self) -> None:
        self.changes = {site: SiteChanges.of(some) for site, some in self.changes.items()}

    @property
    def weights(self) -> list[float]:
        return [concept.weight for concept in self.concepts]

    @property
    def loras(self) -> int:
        """How many concepts have a LoRA; the others keep the base as it is."""
        return sum(concept.lora is not None for concept in self.concepts)

    def samples(self, lockstep: Lockstep) -> Any:
        """The rows on which features are collected, made once, with each LoRA active."""
        if self._samples is None:
            self.outlook.samples_begin()
            self._samples = self.host.samples(
                self.concepts,
                set(self.changes),
                self.calibration,
                lockstep,
                self.generator,
                self.tick,
            )
            self.outlook.samples_end()
        return self._samples

    def lockstep(self) -> Lockstep:
        modules, pace = self.host.sites(), self.outlook.pace
        return Lockstep(modules, self.changes, self.streams, self.processes, pace)


@dataclass
class WeightJob:
    """A merge that looks at weights alone. ``changes[site]`` are the LoRAs' there."""

    changes: Mapping[str, SiteChanges]
    weights: Sequence[float]
    generator: torch.Generator
    tick: Tick
