"""The noise rule of a pipeline's scheduler: from a model's output to less noisy latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import IterisError


def deterministic_scheduler(
    scheduler: Any, steps: int, shape: Sequence[int], patch: int, even_sigmas: bool
) -> Any:
    """One for ``steps`` steps: DDIM for ε, v or sample prediction, Euler for flow matching.

    The scheduler's own configuration decides which, and its noise levels; the pipeline's scheduler
    itself is left alone. ``shape`` is that of one row's latents. Raises :class:`IterisError` for
    one that scales what the model sees.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if "EDM" in name:
        raise IterisError(
            f"{name} scales what the model sees, which is not known here; merge with "
            'latents="noise" and another scheduler.'
        )
    options: dict[str, Any] = {}
    if "FlowMatch" in name or config.get("use_flow_sigmas"):
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
            FlowMatchEulerDiscreteScheduler,
        )

        shift = config.get("shift", config.get("flow_shift", 1.0))
        made: Any = FlowMatchEulerDiscreteScheduler.from_config(
            config, shift=shift, stochastic_sampling=False
        )
        if even_sigmas:
            options["sigmas"] = torch.linspace(1.0, 1 / steps, steps).tolist()
        if made.config.use_dynamic_shifting:
            options["mu"] = _shift(made.config, shape, patch)
    else:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        made = DDIMScheduler.from_config(config)
    made.set_timesteps(steps, **options)
    return made


def _shift(config: Any, shape: Sequence[int], patch: int) -> float:
    """How far noise levels move up with the number of image tokens (SD 3, section 5.3.2): of packed
    latents, or of (channels, height, width)."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    tokens = shape[0] if len(shape) == 2 else math.prod(side // patch for side in shape[1:])
    lengths = config.base_image_seq_len, config.max_image_seq_len
    return calculate_shift(tokens, *lengths, config.base_shift, config.max_shift)
