"""What a method gets: the LoRAs' changes, the host, and what the run is to keep to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..activations.lockstep import Lockstep
from ..activations.processes import ALONE, Shards
from ..concepts import Calibration, Concept
from ..hosts.protocol import Host, Tick
from ..lora import LowRank


@dataclass
class Job:
    """What a method gets. ``references[site][i]`` is concept i's change there, at its strength.

    ``host`` is None for a method that only looks at weights. A method may add sites to
    ``references``, said in ``repairs`` with those of their inputs that may be used (None: all), and
    the host's ``streams``; ``rows`` and ``convergence`` are for it to fill in for the report.
    ``shards`` is this process's part of the rows: what a method sums over rows it has to add up
    over the processes, as :class:`..collector.Collector` does. ``memory_budget`` is in bytes beyond
    the model (``"free"``: what is free; None: no limit); ``plan`` says how each stage keeps to it.
    """

    host: Host | None
    concepts: Sequence[Concept]
    references: Mapping[str, Sequence[LowRank | None]]
    calibration: Calibration
    generator: torch.Generator
    tick: Tick
    repairs: Mapping[str, Tensor | None] = field(default_factory=dict[str, Any])
    streams: Mapping[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    rows: int = 0
    convergence: list[float] = field(default_factory=list[float])
    made: Any = None
    shards: Shards = ALONE
    memory_budget: int | Literal["free"] | None = None
    plan: list[str] = field(default_factory=list[str])

    @property
    def weights(self) -> list[float]:
        return [concept.weight for concept in self.concepts]

    @property
    def loras(self) -> int:
        """How many concepts have a LoRA; the others keep the base as it is."""
        return sum(concept.lora is not None for concept in self.concepts)

    def samples(self, lockstep: Lockstep) -> Any:
        """The rows on which features are collected, made once, with each LoRA active."""
        assert self.host is not None
        if self.made is None:
            self.made = self.host.samples(
                self.concepts,
                set(self.references),
                self.calibration,
                lockstep,
                self.generator,
                self.tick,
            )
        return self.made

    def lockstep(self) -> Lockstep:
        assert self.host is not None
        return Lockstep(self.host.sites(), self.references, self.streams, self.shards)
