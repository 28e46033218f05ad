"""Final outputs on rows that no fit saw; what a merged LoRA keeps there of each LoRA."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..activations.memory import halved, with_less
from ..activations.rows import phantom_of
from ..calibration import Calibration
from ..errors import BaseError, SiteError
from ..hosts.protocol import Host, SampleRequest
from ..lora import LowRank
from .batches import chunks
from .changes import added, beside
from .job import Job

_SAMPLES, _TIMESTEPS, _BATCH = 4, 2, 8
_SEED = 1 << 20

WHAT = "held-out rows"
"""The ``what`` of progress."""
STRENGTHS = 0.75, 1.0, 1.25
BESIDE = "beside another LoRA"
_BESIDE = 0.6


def held_out(calibration: Calibration, samples: int, timesteps: int) -> Calibration:
    """A calibration for a few rows of other prompts and noise than those of a fit."""
    return replace(
        calibration,
        samples=min(samples, calibration.samples),
        timesteps=min(timesteps, calibration.rows_each),
        seed=calibration.seed ^ _SEED,
        conditions=0.0,
        contexts=0.0 if calibration.contexts == 0 else 1.0,
    )


@dataclass
class FinalOutputs:
    """The model's final outputs on ``samples``, so many rows ``at_once``."""

    host: Host
    samples: Any
    at_once: int = _BATCH

    def under(
        self, changes: Mapping[str, LowRank], concepts: Collection[int] | None = None
    ) -> dict[int, Tensor]:
        """Row of the ``concepts`` (None: all) → its output with ``changes`` on the base, float64,
        on the CPU."""

        def run(at_once: int) -> dict[int, Tensor]:
            found: dict[int, Tensor] = {}
            for stage in self.host.stages(self.samples, self.host.sites().keys()):
                wanted = None if stage.feeds_next else concepts
                part = [
                    at
                    for at, row in enumerate(stage.rows)
                    if wanted is None or row.concept in wanted
                ]
                for some in chunks(part, [row.key for row in stage.rows], at_once):
                    rows = stage.at(some)
                    if stage.final is None:
                        stage.forward(rows, 1)
                        continue
                    outputs = stage.final(rows, 0).cpu().double()
                    if len(outputs) != len(rows):
                        raise SiteError("the model's outputs are not one for each row.")
                    found.update(zip((row.number for row in rows), outputs, strict=True))
            if not found:
                raise BaseError("no stage of the host returns final outputs (Stage.final).")
            return found

        what = "Out of memory while measuring held-out rows"
        with torch.no_grad(), added(self.host, changes):
            sizes = halved(self.at_once)
            found, self.at_once = with_less(sizes, run, lambda said, _: f"{what} ({said}).")
        return found


def held_out_work(job: Job, versions: int = 1) -> list[float]:
    """The work of :func:`kept`, step by step, for so many versions of a merge."""
    if not (job.host.pictures and job.trace.stages):
        return []
    calibration = held_out(job.calibration, _SAMPLES, _TIMESTEPS)
    rows = job.loras * calibration.samples * calibration.rows_each
    denoised = job.loras * calibration.samples * calibration.denoising_steps
    each = (versions + 1) * rows
    forwards = [denoised + rows, *[each] * len(STRENGTHS), each + rows]
    return [job.trace.stages[-1].products * count for count in forwards]


def kept(job: Job, *versions: Mapping[str, LowRank]) -> list[dict[str, list[float]]]:
    """For each of several ``versions`` of a merge: how it is loaded → for every concept with a
    LoRA, 1 − ‖f_merged − f_LoRA‖² / ‖f_base − f_LoRA‖² of the final outputs f: 1 for the LoRA
    itself, 0 for the base. Both are loaded at each of :data:`STRENGTHS`, and at 1 with another LoRA
    at 0.6, which the base has there too: a phantom, see :mod:`..activations.rows`. Empty for models
    of texts, whose rows are given."""
    if not job.host.pictures:
        return [{} for _ in versions]
    calibration = held_out(job.calibration, _SAMPLES, _TIMESTEPS)
    own = {
        i: {site: change for site, some in job.changes.items() if (change := some.by_concept[i])}
        for i, concept in enumerate(job.concepts)
        if concept.lora is not None
    }
    phantom = phantom_of(next(iter(own.values())), _BESIDE, calibration.seed)
    total = 1 + len(STRENGTHS) + 1
    generator = torch.Generator().manual_seed(calibration.seed)
    tick = partial(job.bare, f"denoising {WHAT}")
    with torch.no_grad(), job.run() as run:
        fields = job.concepts, calibration, run.lockstep, generator, tick, job.store, run.at_once
        samples = job.host.samples(SampleRequest(*fields, held_out=True))
        final = FinalOutputs(job.host, samples, job.at_once(_BATCH, factors=4))
    job.tick(WHAT, 0, total)
    base = final.under({}, own)
    found: list[dict[str, list[float]]] = [{} for _ in versions]
    for done, strength in enumerate([*STRENGTHS, None], 1):
        job.tick(WHAT, done, total)
        other: Mapping[str, LowRank] = {}
        if strength is None:
            other, base = phantom, final.under(phantom, own)
        outputs = [
            final.under(
                beside({s: change.scaled(strength or 1.0) for s, change in one.items()}, other),
                concepts,
            )
            for one, concepts in (
                *((lora, [i]) for i, lora in own.items()),
                *((version, own) for version in versions),
            )
        ]
        for shares, given in zip(found, outputs[len(own) :], strict=True):
            shares[BESIDE if strength is None else f"{strength:g}"] = [
                1 - error_of(given, base, wanted) for wanted in outputs[: len(own)]
            ]
    job.tick(WHAT, total, total)
    return found


def error_of(
    given: Mapping[int, Tensor], base: Mapping[int, Tensor], wanted: Mapping[int, Tensor]
) -> float:
    """‖given − wanted‖² / ‖base − wanted‖² on the rows of ``wanted``."""
    if any(not given[row].shape == base[row].shape == wanted[row].shape for row in wanted):
        raise SiteError("the model's outputs have other shapes with another LoRA.")
    left, effect = (
        sum(float(((some[row] - wanted[row]) ** 2).sum()) for row in wanted)
        for some in (given, base)
    )
    if not effect:
        raise SiteError("a LoRA changes nothing in the outputs that these rows reach.")
    return left / effect
