"""Rows that show two concepts in one image, for block polish.

The merged model draws from a prompt that names both concepts. Each of the two LoRAs runs alone on
the same latents and prompt. A block's target is its output under the left concept's LoRA in the
left half and under the right one's in the right half. The merged LoRA thus learns a composition by
regions, as in MultiDiffusion (arXiv 2302.08113).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..activations.lockstep import Lockstep
from ..activations.micro_batch import MicroBatch
from ..calibration_prompts import pair_prompts
from ..concepts import Concept
from ..hosts.protocol import DENOISING, Stage
from ..lora import Lora, LowRank, SiteChanges
from ..passes.batches import chunks
from ..passes.job import Job
from .segments import SegmentBatch, SegmentRunner

SHOWING = "drawing two concepts"


@dataclass(frozen=True)
class Pairs:
    """``samples`` are the host's; a row's owner is its index into ``pairs``, which hold the indices
    of the left and the right concept."""

    pairs: Sequence[tuple[int, int]]
    samples: Any


def pairs_of(job: Job, rows: int) -> list[tuple[int, int]]:
    """The pairs to show, which share ``rows`` rows: every concept occurs equally often, each time
    with a different partner. Empty unless two concepts have trigger words."""
    # A style or motion cannot fill half an image, and a learned embedding is active only in its own
    # concept's prompts.
    able = [
        number
        for number, one in enumerate(job.concepts)
        if one.kind == "subject" and one.phrases
        if one.lora is not None and not one.lora.embeddings
    ]
    count = len(able)
    if not job.host.pictures or count < 2:
        return []
    most = max(1, rows // job.calibration.rows_each)
    found = [
        (one, able[(place + step) % count])
        for step in range(1, count)
        for place, one in enumerate(able)
    ]
    return found[: max(most, count)]


def samples_each(job: Job, pairs: Sequence[Any], rows: int) -> int:
    return max(1, round(rows / (len(pairs) * job.calibration.rows_each)))


def drawn_pairs(job: Job, merged: Mapping[str, LowRank], rows: int) -> Pairs | None:
    """About that many rows of images of two concepts, drawn by the merged model."""
    pairs = pairs_of(job, rows)
    if not pairs:
        return None
    lora = Lora(dict(merged), "merged")
    concepts = [
        Concept(lora, pair_prompts(job.concepts[left], job.concepts[right], job.calibration))
        for left, right in pairs
    ]
    changes = {site: SiteChanges((change,) * len(pairs)) for site, change in merged.items()}
    calibration = replace(job.calibration, samples=samples_each(job, pairs, rows), contexts=0.0)

    def tick(what: str, done: int, total: int) -> None:
        job.tick(SHOWING if what == DENOISING else what, done, total)

    with Lockstep(job.host.sites(), changes) as lockstep:
        samples = job.host.samples(
            concepts, set(merged), calibration, lockstep, job.generator, tick
        )
    return Pairs(pairs, samples)


_Side = int | None
"""0 or 1: the left or right concept's LoRA; None: the merged one."""


class SideBySide:
    """The images of ``drawn``, run through the host's stages beside the single-concept rows: as
    merged rows, and under the LoRA of each side."""

    def __init__(self, job: Job, lockstep: Lockstep, drawn: Pairs) -> None:
        self._job, self._lockstep, self._drawn = job, lockstep, drawn
        sites = set(job.changes)
        self._ahead = {side: job.host.stages(drawn.samples, sites) for side in (None, 0, 1)}
        self._stages: dict[_Side, Stage] = {}

    def advance(self, name: str) -> bool:
        """Advance to the stage of that name after running what feeds it; False if no row reaches
        it."""
        return all(self._advanced(side, name) for side in self._ahead)

    def _advanced(self, side: _Side, name: str) -> bool:
        stage = self._stages.get(side)
        while stage is None or stage.name != name:
            stage = next(self._ahead[side], None)
            if stage is None:
                return False
            self._stages[side] = stage
            if stage.name != name and not stage.feeds_next:
                return False
            if stage.feeds_next:
                every, at_once = range(len(stage.concept_ids)), self._job.thresholds.polish_at_once
                for rows in chunks(every, stage.batch_keys, at_once):
                    self._lockstep.run(self._batch(side, rows))
        return True

    def _batch(self, side: _Side, rows: Sequence[int]) -> MicroBatch:
        stage = self._stages[side]
        owners = [pair[side or 0] for pair in self._pairs(stage, rows)]
        return MicroBatch(partial(stage.run, rows, 1), owners, 1, merged_only=side is None)

    def _pairs(self, stage: Stage, rows: Sequence[int]) -> list[tuple[int, int]]:
        return [self._drawn.pairs[stage.concept_ids[row]] for row in rows]

    def recorded(
        self, runner: SegmentRunner, at_once: int, tick: Callable[[], None]
    ) -> Iterator[SegmentBatch]:
        """Inputs and targets of a segment of the stage, in batches of several pairs; none if the
        segment has no spatial output. ``tick`` is called before every batch, and may raise."""
        stage = self._stages[None]
        order = torch.randperm(len(stage.concept_ids), generator=self._job.generator).tolist()
        for rows in chunks(order, stage.batch_keys, at_once):
            tick()
            merged, *sides = (self._batch(side, rows) for side in (None, 0, 1))
            batch = runner.record(merged, rows)
            left, right = map(runner.outputs, sides)
            placed = [
                compose_halves(*both, stage.picture, stage.patches)
                for both in zip(left, right, strict=True)
            ]
            fitting = [some for some in placed if some is not None]
            # If two outputs have as many tokens as the image, one may be the text.
            if not fitting or sum(some.ndim == 3 for some in fitting) > 1:
                return
            # Text tokens have no position, so their target is the mean of both.
            wanted = [
                (one + other) / 2 if some is None else some
                for some, one, other in zip(placed, left, right, strict=True)
            ]
            yield replace(batch, owners=self._pairs(stage, rows), wanted=wanted)


def compose_halves(
    left: Tensor, right: Tensor, picture: Sequence[int] | None, patches: Sequence[int]
) -> Tensor | None:
    """The left half of ``left`` beside the right half of ``right``, two tensors of one shape. They
    are (rows, channels, …, height, width), or (rows, tokens, channels) with one token per patch of
    a ``picture`` of (…, height, width), in reading order. A patch's side is one of ``patches``.
    None for any other shape."""
    shape = left.shape
    if len(shape) >= 4:
        width = shape[-1]
        return torch.where(torch.arange(width, device=left.device) < width / 2, left, right)
    if len(shape) != 3 or picture is None:
        return None
    *others, height, width = picture
    for patch in patches:
        rows, columns = height // patch, width // patch
        if rows * columns * prod(others) == shape[1]:
            column = torch.arange(shape[1], device=left.device) % columns
            return torch.where((column < columns / 2)[:, None], left, right)
    return None
