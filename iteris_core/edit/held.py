"""A LoRA held against the model that it is to stand for: the final output on rows of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..activations.lockstep import Lockstep
from ..concepts import Calibration, Concept
from ..hosts.protocol import Host, Tick
from ..lora import Lora, LowRank
from ..passes.always_on import switched_on

_SAMPLES, _TIMESTEPS, _BATCH = 8, 2, 8
_SEED = 1 << 20
"""Added to the seed of what a LoRA was fitted on."""


def output_error(
    base: Host,
    tuned: Host,
    concept: Concept,
    changes: Mapping[str, LowRank],
    calibration: Calibration,
    tick: Tick,
) -> float:
    """‖f_LoRA − f_tuned‖ / ‖f_base − f_tuned‖ of final outputs, on rows that ``tuned`` denoised to
    prompts of ``concept`` with another seed: 0 of a LoRA that is the fine-tune, 1 of the base."""
    size = min(_SAMPLES, calibration.samples), min(_TIMESTEPS, calibration.timesteps)
    held_out = replace(
        calibration, samples=size[0], timesteps=size[1], seed=calibration.seed ^ _SEED
    )
    generator = torch.Generator().manual_seed(held_out.seed)
    sites = set(changes)
    with torch.no_grad(), Lockstep({}, {}) as lockstep:
        samples = tuned.samples([concept], sites, held_out, lockstep, generator, tick)
        count = sum(
            len(stage.concept_ids) for stage in tuned.stages(samples, sites) if not stage.feeds_next
        )
        wanted = _outputs(tuned, samples, count)
        before = _outputs(base, samples, count)
        with switched_on(base, [Concept(Lora(changes))]):
            after = _outputs(base, samples, count)
    return float((after - wanted).norm() / (before - wanted).norm().clamp(min=1e-30))


def _outputs(host: Host, samples: Any, count: int) -> Tensor:
    rows = range(count)
    return torch.cat([host.forward(samples, [row]).double().flatten().cpu() for row in rows])
