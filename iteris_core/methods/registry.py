"""The register of merge methods, and what a method gets and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..calibration import Calibration, Concept
from ..errors import SettingsError
from ..hosts import Host, Tick
from ..lockstep import Lockstep
from ..lora import LowRank
from ..report import SiteReport
from ..shards import ALONE, Shards


@dataclass
class Task:
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


Merged = Mapping[str, tuple[LowRank, SiteReport]]


@dataclass(frozen=True)
class Method:
    name: str
    merge: Callable[[Task, Any], Merged]
    settings: type
    needs_host: bool
    summary: str


_METHODS: dict[str, Method] = {}


def method(
    name: str, settings: type, *, needs_host: bool
) -> Callable[[Callable[[Task, Any], Merged]], Callable[[Task, Any], Merged]]:
    """Register a merge method; the first line of its docstring is its summary."""

    def register(function: Callable[[Task, Any], Merged]) -> Callable[[Task, Any], Merged]:
        if name in _METHODS:
            raise ValueError(f"There is a method {name!r} already.")
        summary = (function.__doc__ or "").strip().splitlines()[0]
        _METHODS[name] = Method(name, function, settings, needs_host, summary)
        return function

    return register


def find_method(name: str) -> Method:
    found = _METHODS.get(name)
    if found is None:
        raise SettingsError(f"There is no method {name!r}; there are: {', '.join(_METHODS)}.")
    return found


def all_methods() -> list[Method]:
    return list(_METHODS.values())
