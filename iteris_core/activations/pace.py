"""What a row's way to each site takes, from forwards that are run anyway."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .host_memory import wait_for
from .meter import is_apart
from .site import Site

_WATCHED = 8
"""Forwards in which a device that lags behind is waited for at every site: it has nothing to do
meanwhile."""


@dataclass
class Reached:
    """How a site was reached: by so many ``rows`` in so many ``seconds`` from the site before, with
    so many ``tokens`` of each row; ``shares`` says that a site before had the same tokens."""

    rows: int = 0
    seconds: float = 0.0
    tokens: int = 0
    shares: bool = False

    @property
    def of_row(self) -> float:
        """Seconds."""
        return self.seconds / max(self.rows, 1)


class Pace:
    """Of forwards that do not pause: single sites of a model take very different time, and a row
    takes less where many run at once. ``device`` is where they ran, and ``wait`` returns when it
    has finished its work: before that only launches would be measured."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        wait: Callable[[torch.device], None] = wait_for,
    ) -> None:
        self.reached: dict[str, Reached] = {}
        self.device = torch.device("cpu")
        self._clock, self._wait = clock, wait
        self._forwards = 0
        self._last = 0.0
        self._before: dict[str, Reached] = {}
        self._seen: list[tuple[weakref.ref[Tensor], Hashable]] = []

    def restart(self) -> None:
        """What follows is nearer to what is to come than what was before: it takes its place, site
        by site."""
        self._before, self.reached = {**self._before, **self.reached}, {}
        self._forwards = 0

    def wait(self) -> None:
        """Return once the device has finished its work."""
        self._wait(self.device)

    def begin(self) -> None:
        """A forward begins."""
        self._forwards += 1
        if self._watches(self.device):
            self.wait()
        self._last = self._clock()
        self._seen.clear()

    def note(self, name: str, site: Site, inputs: Tensor, outputs: Tensor) -> None:
        """A forward has come to the end of a site."""
        self.device = inputs.device
        if not self._watches(self.device):
            return
        self.wait()
        now = self._clock()
        found = self.reached.setdefault(name, Reached())
        found.rows += len(inputs)
        found.seconds += now - self._last
        found.tokens = site.length(outputs)
        self._seen = [entry for entry in self._seen if entry[0]() is not None]
        same = any(ref() is inputs and how == site.geometry for ref, how in self._seen)
        found.shares = same
        if not same:
            self._seen.append((weakref.ref(inputs), site.geometry))
        self._last = self._clock()

    def hook(self, name: str, site: Site) -> Callable[..., None]:
        """A forward hook for the module at ``name`` that does :meth:`note`."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.note(name, site, args[0], output)

        return hook

    def _watches(self, device: torch.device) -> bool:
        return self._forwards <= _WATCHED or not is_apart(device)

    def of(self, name: str) -> Reached | None:
        """How a site was reached last; None if it was not."""
        return self.reached.get(name) or self._before.get(name)
