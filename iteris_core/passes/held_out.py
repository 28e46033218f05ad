"""Final outputs on rows that no fit saw; what a merged LoRA keeps there of each LoRA."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..activations.memory import halved, with_less
from ..activations.site import phantom_of
from ..calibration import Calibration
from ..errors import SiteError
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
    """The rows of ``samples`` in the stages whose outputs are final: each one's concept, and its
    batch key; they run so many ``at_once``."""

    host: Host
    samples: Any
    owners: Mapping[int, int]
    kinds: Mapping[int, Hashable]
    at_once: int = _BATCH

    @classmethod
    def of(cls, host: Host, samples: Any, at_once: int = _BATCH) -> FinalOutputs:
        owners: dict[int, int] = {}
        kinds: dict[int, Hashable] = {}
        for stage in host.stages(samples, host.sites().keys()):
            for row in stage.rows:
                if stage.feeds_next:
                    stage.forward([row], 1)
                else:
                    owners[row.number], kinds[row.number] = row.concept, (stage.name, row.key)
        return cls(host, samples, owners, kinds, at_once)

    def under(
        self, changes: Mapping[str, LowRank], concepts: Collection[int] | None = None
    ) -> dict[int, Tensor]:
        """Row of the ``concepts`` (None: all) → its output with ``changes`` on the base, float64,
        on the CPU."""
        rows = [row for row, owner in self.owners.items() if concepts is None or owner in concepts]

        def run(at_once: int) -> dict[int, Tensor]:
            found: dict[int, Tensor] = {}
            for some in chunks(range(len(rows)), [self.kinds[row] for row in rows], at_once):
                some = [rows[at] for at in some]
                outputs = self.host.forward(self.samples, some).cpu().double()
                if len(outputs) != len(some):
                    raise SiteError("the model's outputs are not one for each row.")
                found.update(zip(some, outputs, strict=True))
            return found

        what = "Out of memory while measuring held-out rows"
        with torch.no_grad(), added(self.host, changes):
            sizes = halved(self.at_once)
            found, self.at_once = with_less(sizes, run, lambda said, _: f"{what} ({said}).")
        return found


def expect_held_out(job: Job, versions: int = 1) -> None:
    """Expect the work of :func:`kept` for so many versions of a merge."""
    if job.host.pictures:
        calibration = held_out(job.calibration, _SAMPLES, _TIMESTEPS)
        rows = job.loras * calibration.samples * calibration.rows_each
        denoised = job.loras * calibration.samples * calibration.denoising_steps
        each = (versions + 1) * rows
        forwards = [denoised + rows, *[each] * len(STRENGTHS), each + rows]
        work = job.trace.stages[-1].products if job.trace.stages else 0.0
        job.eta.expect(WHAT, [work * some for some in forwards])


def kept(job: Job, *versions: Mapping[str, LowRank]) -> list[dict[str, list[float]]]:
    """For each of several ``versions`` of a merge: how it is loaded → for every concept with a
    LoRA, 1 − ‖f_merged − f_LoRA‖² / ‖f_base − f_LoRA‖² of the final outputs f: 1 for the LoRA
    itself, 0 for the base. Both are loaded at each of :data:`STRENGTHS`, and at 1 with another LoRA
    at 0.6, which the base has there too: a phantom, see :mod:`..activations.site`. Empty for models
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
        final = FinalOutputs.of(job.host, samples, job.at_once(_BATCH, factors=4))
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
