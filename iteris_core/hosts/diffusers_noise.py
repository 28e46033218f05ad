"""The noise rule of a pipeline's scheduler: from a model's output to less noisy latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import IterisError

Predict = Callable[[Tensor, Tensor], Tensor]
"""``predict(latents, timestep)``: the denoiser's output for all rows, at one timestep."""


class NoiseSchedule:
    """``steps`` deterministic steps: DDIM for ε, v or sample prediction, Euler for flow matching.

    The scheduler's own configuration decides which, and its noise levels; the pipeline's scheduler
    itself is left alone. ``shape`` is that of one row's latents.
    """

    def __init__(
        self, scheduler: Any, steps: int, shape: Sequence[int], patch: int, *, even_sigmas: bool
    ) -> None:
        self._steps = steps
        self._options: dict[str, Any] = {}
        config = scheduler.config
        if "EDM" in type(scheduler).__name__:
            raise IterisError(
                f"{type(scheduler).__name__} scales what the model sees, which is not known here; "
                'merge with latents="noise" and another scheduler.'
            )
        self._flow = "FlowMatch" in type(scheduler).__name__ or bool(config.get("use_flow_sigmas"))
        if self._flow:
            from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
                FlowMatchEulerDiscreteScheduler,
            )

            self._scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(
                config,
                shift=config.get("shift", config.get("flow_shift", 1.0)),
                stochastic_sampling=False,
            )
            if even_sigmas:
                self._options["sigmas"] = torch.linspace(1.0, 1 / steps, steps).tolist()
            if self._scheduler.config.use_dynamic_shifting:
                self._options["mu"] = _shift(self._scheduler.config, shape, patch)
        else:
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler

            self._scheduler = DDIMScheduler.from_config(config)
        self._restart()

    @property
    def timesteps(self) -> Tensor:
        """(steps,), noisiest first."""
        return self._scheduler.timesteps

    def denoise(
        self, latents: Tensor, predict: Predict, keep: Callable[[int, Tensor], None]
    ) -> None:
        """Take ``latents``, pure noise, (rows, …), through all steps; ``keep(step, latents)`` is
        called before each."""
        self._restart()
        for step, timestep in enumerate(self.timesteps):
            keep(step, latents)
            output = predict(latents, timestep)
            latents = self._scheduler.step(output, timestep, latents, return_dict=False)[0]

    def _restart(self) -> None:
        self._scheduler.set_timesteps(self._steps, **self._options)


def _shift(config: Any, shape: Sequence[int], patch: int) -> float:
    """How far noise levels move up with the number of image tokens (SD 3, section 5.3.2): of packed
    latents, or of (channels, height, width)."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    tokens = shape[0] if len(shape) == 2 else math.prod(side // patch for side in shape[1:])
    lengths = config.base_image_seq_len, config.max_image_seq_len
    return calculate_shift(tokens, *lengths, config.base_shift, config.max_shift)
