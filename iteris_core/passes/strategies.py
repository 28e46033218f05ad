"""The ladder of strategies for running a sweep, fastest first; all but two give the same result.

Rows wait on the device at every site, which needs most memory; or in host memory, at the end of
every level; or block by block (:mod:`..activations.barriers`), on the device or in host memory. In
the last case a row waits with only the inputs of a small or large block. As a last resort, rows in
host memory are rounded to 8 or 4 bits (:mod:`..activations.packing`). The planner uses the first
strategy that fits; if memory runs out anyway, the merge continues from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from ..activations.barriers import Barriers, ExecutionTrace, watched, with_replayable
from ..activations.host_pool import OffloadStore
from ..activations.lockstep import Lockstep
from ..activations.memory import free_memory, is_apart, usable
from ..activations.micro_batch import MicroBatch
from ..activations.packing import PackedPlace
from ..hosts.protocol import Stage
from ..solve.choose import THRESHOLDS, Thresholds

BLOCKS = {"small blocks": 1.4, "large blocks": 2.1}
"""Sizes of :attr:`..solve.choose.Thresholds.blocks`, and the measured slowdown of a sweep
(docs/decisions.md)."""
_IN_HOST, _BLOCKS_IN_HOST = 1.4, 1.25  # times longer
_PACKED = {8: 1.1, 4: 1.2}
"""Bits at which rows wait, and the estimated slowdown of a sweep."""


@dataclass(frozen=True)
class Strategy:
    """Rows pause at the end of each of the ``barriers`` (None: at every site). If it ``offloads`` a
    device, rows without space there wait in host memory, at ``bits`` bits (None: unchanged). A
    sweep takes ``slower`` times as long as with the first strategy."""

    name: str = ""
    slower: float = 1.0
    barriers: Barriers | None = field(default=None, repr=False)
    offloads: torch.device | None = None
    bits: int | None = None

    def place(self, place: OffloadStore) -> OffloadStore:
        """``place``, packed if this strategy packs rows."""
        return PackedPlace(place, self.bits) if self.bits else place

    @property
    def by_blocks(self) -> bool:
        return self.barriers is not None and bool(self.barriers.blocks)


ON_DEVICE = Strategy("waiting on the device")
IN_HOST = "waiting in host memory"
PACKED = ", at {} bits"


def ladder(stage: Stage, lockstep: Lockstep, thresholds: Thresholds) -> Iterator[Strategy]:
    """All strategies after the first, :data:`ON_DEVICE`; a row or two run to find them."""
    found = find(stage, lockstep)
    apart = is_apart(found.device)
    last = Strategy(IN_HOST, _IN_HOST, found.barriers(), found.device)
    if apart:
        yield last
    before = None
    for most, (size, slower) in zip(thresholds.blocks, BLOCKS.items(), strict=False):
        barriers = replayable(stage, lockstep, found.barriers(most), thresholds)
        if not barriers.blocks or barriers.blocks == before:
            continue
        before = barriers.blocks
        yield Strategy(f"{ON_DEVICE.name}, by {size}", slower, barriers)
        if apart:
            slower *= _BLOCKS_IN_HOST
            last = Strategy(f"{IN_HOST}, by {size}", slower, barriers, found.device)
            yield last
    if apart:
        for bits, slower in _PACKED.items():
            name = last.name + PACKED.format(bits)
            yield replace(last, name=name, slower=slower * last.slower, bits=bits)


def find(stage: Stage, lockstep: Lockstep) -> ExecutionTrace:
    """The barriers of a stage, found with its first row."""
    return watched(lockstep.run, _first_row(stage))


def replayable(
    stage: Stage, lockstep: Lockstep, barriers: Barriers, thresholds: Thresholds = THRESHOLDS
) -> Barriers:
    """``barriers`` with the blocks that can be replayed."""
    return with_replayable(barriers, lockstep.run, _first_row(stage), thresholds.replay_error)


def free_host() -> int:
    """Bytes of host memory that a merge may use."""
    return usable(free_memory(torch.device("cpu")))


def _first_row(stage: Stage) -> MicroBatch:
    return MicroBatch(lambda: stage.run([0], 1), [stage.concept_ids[0]], 1)
