"""The cost of the other strategies for a sweep, compared with all rows waiting on the device.

The CPU's memory stands in for a device's, so copies run at its speed and do not overlap with a
forward. ``mib`` is the peak of live tensors beyond the model, excluding those in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

from models import in_turn, medians, toybox_concepts, toybox_host

from iteris_core import Calibration, IterisError, LowRank, merge_loras
from iteris_core.activations.host_pool import HostPool
from iteris_core.activations.memory import MemoryMeter
from iteris_core.passes import sweep as loops
from iteris_core.passes.planner import (
    BLOCKS,
    IN_HOST,
    ON_DEVICE,
    Plan,
    Strategy,
    find,
    replayable,
)
from iteris_core.solve.choose import THRESHOLDS
from toybox import TEMPLATES

WAYS = tuple(
    f"{place}{blocks}"
    for blocks in ("", *(f", by {size}" for size in BLOCKS))
    for place in (ON_DEVICE.name, IN_HOST)
)
"""Every strategy with the same result, by its name in plans; the first is the fastest."""


@contextmanager
def forced(way: str) -> Iterator[None]:
    """Sweeps run so, whatever there is room for. Raises :class:`IterisError` where no stage can."""
    place, _, size = way.partition(", by ")
    ran: list[str] = []

    def planned(run: Any, stage: Any, _: Any, batching: Any, *, schedule: Any) -> Plan:
        if not (schedule.sweep and stage.sites):
            return Plan(stage, batching.rows, Strategy())
        barriers = offloads = None
        if way != ON_DEVICE.name:
            most = dict(zip(BLOCKS, THRESHOLDS.blocks, strict=True)).get(size, 0)
            barriers = find(stage, run.lockstep).barriers(most)
        if size:
            barriers = replayable(stage, run.lockstep, barriers)
        if place == IN_HOST:
            offloads = next(next(iter(run.job.host.sites().values())).parameters()).device
        if not size or barriers.blocks:
            ran.append(stage.name)
        strategy = Strategy(way, barriers=barriers, offloads=offloads)
        return Plan(stage, batching.rows, strategy)

    with patch.object(loops, "planned", planned):
        yield
        if not ran:
            raise IterisError(f"No stage can be run {way}.")


def compare(rounds: int, rows: int) -> dict[str, Any]:
    """On the toybox, ``rows`` a forward; ``ratios`` are medians of each way over the first, round
    by round."""
    host = toybox_host()
    concepts = toybox_concepts(host, 2)
    calibration = Calibration(samples=50, timesteps=2, latents="noise", templates=TEMPLATES)
    places: list[HostPool] = []

    def place(*args: Any, **more: Any) -> HostPool:
        places.append(HostPool(*args, **more))
        return places[-1]

    def merge(way: str) -> Any:
        with forced(way), patch.object(loops, "HostPool", place):
            return merge_loras(
                host, concepts, settings={"micro_batch": rows}, calibration=calibration
            )

    merges = {way: lambda w=way: merge(w) for way in WAYS}
    seconds = in_turn(merges, rounds)
    found: dict[str, Any] = {"rows": rows, "seconds": medians(seconds)}
    found |= {"mib": {}, "waits_in_mib": {}, "moved_mib": {}}
    results: dict[str, Any] = {}
    for way in WAYS:
        places.clear()
        with MemoryMeter() as meter:
            results[way] = merge(way).lora.sites
        found["mib"][way] = meter.peak / 2**20
        if places:
            found["waits_in_mib"][way] = max(memory.taken for memory in places) / 2**20
            found["moved_mib"][way] = sum(memory.moved for memory in places) / 2**20
    first, *others = WAYS
    found["ratios"] = {
        way: median(there / here for here, there in zip(seconds[first], seconds[way], strict=True))
        for way in others
    }
    found["differences"] = {way: difference(results[first], results[way]) for way in others}
    return found


def difference(here: Mapping[str, LowRank], there: Mapping[str, LowRank]) -> float:
    """The largest relative one of a site's change; 0 where all are the same to the bit."""
    return max(
        float((there[site].dense() - change.dense()).norm() / change.dense().norm())
        for site, change in here.items()
    )
