"""The rows of a stage as micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..focus import Focus
from ..hosts import Stage
from ..lockstep import MicroBatch, Visitor
from ..shards import ALONE, Shards
from ..visit import TokenChoice


@dataclass(frozen=True)
class Batching:
    """``rows`` a forward; at most ``row_tokens`` tokens of each row in the moments (None: all).

    Of stages whose tokens are places of a picture, ``focus`` is :mod:`..focus`'s f.
    ``cross`` and ``itemsize`` tell which moments are kept, for the memory that they need, see
    :func:`..memory.statistics_bytes`.
    """

    rows: int
    row_tokens: int | None = None
    seed: int = 0
    focus: float = 0.0
    cross: bool = False
    itemsize: int = 4


def micro_batches(
    stage: Stage,
    copies: int,
    visitor: Visitor | None,
    batching: Batching,
    shards: Shards = ALONE,
) -> Iterator[MicroBatch]:
    """This process's rows of a stage in order, ``batching.rows`` at a time. Where a later stage
    needs all rows, those of other processes follow, and no visitor sees them."""
    if not stage.sites:
        yield from _of(stage, range(len(stage.owners)), copies, None, batching)
        return
    yield from _of(stage, shards.mine(len(stage.owners)), copies, visitor, batching)
    if stage.feeds:
        yield from _of(stage, shards.others(len(stage.owners)), copies, None, batching)


def _of(
    stage: Stage, part: Sequence[int], copies: int, visitor: Visitor | None, batching: Batching
) -> Iterator[MicroBatch]:
    size, limit = batching.rows, batching.row_tokens
    for start in range(0, len(part), size):
        rows = part[start : start + size]

        def run(rows: Sequence[int] = rows) -> None:
            stage.run(rows, copies)

        def mask_of(site: str, rows: Sequence[int] = rows) -> Tensor | None:
            return stage.mask(site, rows) if stage.mask is not None else None

        owners = [stage.owners[row] for row in rows]
        choice = None if limit is None else TokenChoice(rows, limit, batching.seed)
        focus = Focus(batching.focus) if stage.places and batching.focus else None
        yield MicroBatch(
            run,
            owners,
            copies,
            visitor,
            mask_of=mask_of,
            stage=stage.name,
            choice=choice,
            focus=focus,
        )
