"""The rows of a stage as micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..activations.lockstep import MicroBatch, Visitor
from ..activations.processes import ALONE, Shards
from ..activations.saliency import Focus
from ..activations.tokens import TokenChoice
from ..hosts.protocol import Stage

LEAST = 128
PER_INPUT = 32


@dataclass(frozen=True)
class Batching:
    """``rows`` a forward; at most ``row_tokens`` tokens of each row in the moments (None: all;
    "enough": of a picture's :data:`LEAST`, or what gives every concept :data:`PER_INPUT` tokens for
    each of a site's inputs).

    Of stages whose tokens are places of a picture, ``focus`` is :mod:`..focus`'s f.
    ``cross`` and ``itemsize`` tell which moments are kept, for the memory that they need, see
    :func:`..solve_memory.statistics_bytes`.
    """

    rows: int
    row_tokens: int | Literal["enough"] | None = None
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
    """This process's rows of a stage, kind by kind and in order within each, ``batching.rows`` at a
    time. Where a later stage needs all rows, those of other processes follow, and no visitor sees
    them."""
    if not stage.sites:
        yield from _of(stage, range(len(stage.owners)), copies, None, batching)
        return
    yield from _of(stage, shards.mine(len(stage.owners)), copies, visitor, batching)
    if stage.feeds:
        yield from _of(stage, shards.others(len(stage.owners)), copies, None, batching)


def _limit(stage: Stage, batching: Batching) -> Callable[[int], int] | None:
    limit = batching.row_tokens
    if limit is None or (limit == "enough" and not stage.places):
        return None
    if limit != "enough":
        return lambda width: limit
    rows = min(Counter(stage.owners).values())
    return lambda width: max(LEAST, -(-PER_INPUT * width // rows))


def chunks(
    part: Sequence[int], kinds: Sequence[Hashable] | None, size: int
) -> Iterator[Sequence[int]]:
    """The rows of ``part``, at most ``size`` at a time, and only rows of one kind together; in
    order within a kind. ``kinds`` has an entry for every row that ``part`` may name."""
    alike: dict[Hashable, list[int]] = {}
    for row in part:
        alike.setdefault(None if kinds is None else kinds[row], []).append(row)
    for rows in alike.values():
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _of(
    stage: Stage, part: Sequence[int], copies: int, visitor: Visitor | None, batching: Batching
) -> Iterator[MicroBatch]:
    limit = _limit(stage, batching)
    for rows in chunks(part, stage.kinds, batching.rows):

        def run(rows: Sequence[int] = rows) -> None:
            stage.run(rows, copies)

        def mask_of(site: str, rows: Sequence[int] = rows) -> Tensor | None:
            return stage.mask(site, rows) if stage.mask is not None else None

        owners = [stage.owners[row] for row in rows]
        choice = TokenChoice(rows, limit, batching.seed)
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
