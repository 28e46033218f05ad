"""The passes of a merge, and the rows of a stage as micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

from ..activations.micro_batch import MicroBatch, Observer
from ..activations.tokens import TokenSampling
from ..hosts.protocol import Stage
from ..solve.choose import THRESHOLDS, Thresholds

_GOLDEN = 0.618034


@dataclass(frozen=True)
class ExecutionConfig:
    """``rows`` per forward. At most ``row_tokens`` tokens of each row count (None: all; "enough":
    for images the ``thresholds``'s number, for texts all), chosen at random by ``seed``;
    ``saliency`` is the share in :class:`..activations.tokens.Saliency` for images."""

    rows: int
    row_tokens: int | Literal["enough"] | None = None
    seed: int = 0
    saliency: float = 0.0
    thresholds: Thresholds = THRESHOLDS


@dataclass(frozen=True)
class Schedule:
    """A ``sweep``; or that many passes."""

    sweep: bool = True
    passes: int = 1

    @property
    def copies(self) -> int:
        """The largest number of copies of every row."""
        return 2 if self.sweep or self.passes > 1 else 1


SWEEP, REFERENCE = Schedule(), Schedule(sweep=False)


def micro_batches(
    stage: Stage,
    copies: int,
    observer: Observer | None,
    batching: ExecutionConfig,
    first: Set[int] = frozenset(),
) -> Iterator[MicroBatch]:
    """The rows of a stage, grouped by kind and in order within each, ``batching.rows`` at a time.
    Rows in ``first`` come before all others."""
    every, limit = range(len(stage.rows)), limit_of(stage, batching)
    keys = [row.key for row in stage.rows]
    parts = [row for row in every if row in first], [row for row in every if row not in first]
    mask = stage.mask
    for rows in (rows for part in parts for rows in chunks(part, keys, batching.rows)):
        of_batch = stage.at(rows)
        yield MicroBatch(
            partial(stage.forward, of_batch, copies),
            of_batch,
            copies,
            observer if stage.sites else None,
            mask_of=None if mask is None else lambda site, rows=of_batch: mask(site, rows),
            stage=stage.name,
            sampling=TokenSampling(rows, limit, batching.seed),
            saliency=batching.saliency if stage.spatial else 0.0,
        )


def sampled_rows(stage: Stage, thresholds: Thresholds) -> Set[int]:
    """The rows from which targets are sampled, evenly over each concept's rows; for texts, whose
    rows have few tokens, all."""
    if stage.mask is not None:
        return set(range(len(stage.rows)))
    return {row for rows in _by_concept(stage) for row in _evenly(rows, thresholds.sample_rows)}


def chunks(
    part: Sequence[int], kinds: Sequence[Hashable] | None, size: int
) -> Iterator[Sequence[int]]:
    """The rows of ``part``, at most ``size`` at a time, only rows of one kind together, and in
    order within a kind. ``kinds`` has an entry for every row that ``part`` may contain."""
    alike: dict[Hashable, list[int]] = {}
    for row in part:
        alike.setdefault(None if kinds is None else kinds[row], []).append(row)
    for rows in alike.values():
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def limit_of(stage: Stage, batching: ExecutionConfig) -> Callable[[int], int] | None:
    """The number of a row's tokens that count at a site with that many inputs; None: all."""
    limit, thresholds = batching.row_tokens, batching.thresholds
    if limit is None or (limit == "enough" and not stage.spatial):
        return None
    if limit != "enough":
        return lambda width: limit
    # Concepts without a LoRA have fewer.
    rows = max(Counter(row.concept for row in stage.rows).values())
    return partial(thresholds.row_tokens, rows=rows)


def fewer(stage: Stage, count: int) -> Stage:
    """At most ``count`` rows of ``stage``, but one of each concept: beside that one the same share
    of each, over all steps and as many of its samples as possible."""
    parts = _by_concept(stage)
    left, most = max(count - len(parts), 0), len(stage.rows) - len(parts)
    kept = [_evenly(rows, 1 + (len(rows) - 1) * left // max(most, 1)) for rows in parts]
    return selected(stage, [row for rows in kept for row in rows])


def _by_concept(stage: Stage) -> list[list[int]]:
    rows: dict[int, list[int]] = {}
    for place, row in enumerate(stage.rows):
        rows.setdefault(row.concept, []).append(place)
    return list(rows.values())


def _evenly(rows: Sequence[int], count: int) -> list[int]:
    """``count`` of the ``rows``; these, or the omitted ones if they are fewer, are one of each of
    so many equal parts, at golden-ratio offsets. A sample's rows are ordered by step, so taking
    every fourth would always pick its noisiest step."""
    total, few = len(rows), count * 2 <= len(rows)
    parts = count if few else max(total - count, 0)
    ends = [part * total // max(parts, 1) for part in range(parts + 1)]
    picked = {
        start + int(part * _GOLDEN % 1 * (stop - start))
        for part, (start, stop) in enumerate(pairwise(ends))
    }
    return [row for index, row in enumerate(rows) if (index in picked) == few]


def selected(stage: Stage, rows: Sequence[int]) -> Stage:
    """``stage`` with some of its rows."""
    samples = stage.samples
    if samples is not None:
        samples = max(1, samples * len(rows) // len(stage.rows))
    return replace(stage, rows=stage.at(rows), samples=samples)
