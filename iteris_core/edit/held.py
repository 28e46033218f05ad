"""Compares a LoRA with the model that it should replace, by the final output on separate rows."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..activations.lockstep import Lockstep
from ..concepts import Calibration, Concept
from ..hosts.protocol import Host, Tick
from ..lora import Lora
from ..passes.held_out import FinalOutputs, error_of, held_out
from .vectors import with_vectors

_SAMPLES, _TIMESTEPS = 8, 2


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
    separate = held_out(calibration, _SAMPLES, _TIMESTEPS)
    generator = torch.Generator().manual_seed(separate.seed)
    sites = set(lora.sites)
    with torch.no_grad(), Lockstep({}, {}) as lockstep:
        samples = tuned.samples([concept], sites, separate, lockstep, generator, tick)
        final = FinalOutputs.of(tuned, samples, sites)
        wanted = final.under({})
        final = replace(final, host=base)
        before = final.under({})
        with with_vectors(base, lora.vectors):
            after = final.under(lora.sites)
    return math.sqrt(error_of(after, before, wanted))
