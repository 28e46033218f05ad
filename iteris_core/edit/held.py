"""Compares a LoRA with the model that it should replace, by the final output on separate rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..activations.lockstep import Lockstep
from ..activations.oom_retry import halved, with_less
from ..concepts import Calibration, Concept
from ..hosts.protocol import Host, Tick
from ..lora import Lora
from ..passes.batches import chunks
from ..passes.changes import switched_on
from .vectors import with_vectors

_SAMPLES, _TIMESTEPS, _BATCH = 8, 2, 8
_SEED = 1 << 20
"""Added to the seed of the rows on which a LoRA was fitted."""


def output_error(
    base: Host,
    tuned: Host,
    concept: Concept,
    lora: Lora,
    calibration: Calibration,
    tick: Tick,
) -> float:
    """‖f_LoRA − f_tuned‖ / ‖f_base − f_tuned‖ of final outputs, on rows that ``tuned`` denoised
    from prompts of ``concept`` with another seed: 0 for a perfect LoRA, 1 for the base."""
    size = min(_SAMPLES, calibration.samples), min(_TIMESTEPS, calibration.rows_each)
    held_out = replace(
        calibration, samples=size[0], timesteps=size[1], seed=calibration.seed ^ _SEED
    )
    generator = torch.Generator().manual_seed(held_out.seed)
    sites = set(lora.sites)
    with torch.no_grad(), Lockstep({}, {}) as lockstep:
        samples = tuned.samples([concept], sites, held_out, lockstep, generator, tick)
        kinds = _kinds(tuned, samples, sites)
        wanted = _outputs(tuned, samples, kinds)
        before = _outputs(base, samples, kinds)
        with with_vectors(base, lora.vectors), switched_on(base, [Concept(lora)]):
            after = _outputs(base, samples, kinds)
    return float((after - wanted).norm() / (before - wanted).norm().clamp(min=1e-30))


def _kinds(host: Host, samples: Any, sites: Set[str]) -> list[Hashable]:
    """The batch key of every row in the stages whose outputs are final."""
    kinds: list[Hashable] = []
    for stage in host.stages(samples, sites):
        count = len(stage.concept_ids)
        if not stage.feeds_next:
            kinds += stage.batch_keys or [None] * count
        else:
            for row in range(count):
                stage.run([row], 1)
    return kinds


def _outputs(host: Host, samples: Any, kinds: Sequence[Hashable]) -> Tensor:
    def run(at_once: int) -> Tensor:
        parts = chunks(range(len(kinds)), kinds, at_once)
        return torch.cat([host.forward(samples, rows).double().flatten().cpu() for rows in parts])

    what = "Out of memory while comparing the LoRA with the model"
    return with_less(halved(_BATCH), run, lambda said, tried: f"{what} ({said}).")[0]
