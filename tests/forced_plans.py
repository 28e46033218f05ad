"""Sweeps in a way that no lack of memory asks for, and what they leave in host memory."""

from typing import Any

import torch

from iteris_core.activations.host_pool import HostPool
from iteris_core.passes import sweep
from iteris_core.passes.planner import Plan, Strategy, find, replayable

CPU = torch.device("cpu")


def planned_as(
    most: int | None,
    offloads: torch.device | None,
    replayed: list[Any] | None = None,
    bits: int | None = None,
) -> Any:
    """In place of :func:`iteris_core.passes.planner.planned`: with blocks of so many barriers
    (None: pausing at every site), which are added to ``replayed``."""

    def planned(run: Any, stage: Any, _: Any, batching: Any, **__: Any) -> Plan:
        if most is None or not stage.sites:
            return Plan(stage, batching.rows, Strategy())
        barriers = replayable(stage, run.lockstep, find(stage, run.lockstep).barriers(most))
        if replayed is not None:
            replayed.extend(barriers.blocks)
        strategy = Strategy(barriers=barriers, offloads=offloads, bits=bits)
        return Plan(stage, batching.rows, strategy)

    return planned


class RecordedPool(HostPool):
    """``left`` are the bytes that it still held when it was closed."""

    left = -1

    def close(self) -> None:
        self.left = self.taken - sum(stop - start for _, start, stop in self._gaps)
        super().close()


def recorded_pools(monkeypatch: Any) -> list[RecordedPool]:
    """The host memories of all later sweeps."""
    made: list[RecordedPool] = []

    def make(*args: Any, **more: Any) -> RecordedPool:
        made.append(RecordedPool(*args, **more))
        return made[-1]

    monkeypatch.setattr(sweep, "HostPool", make)
    return made
