"""Several concepts in a row, each region denoised by what belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor

from iteris_core import Lora
from iteris_core.hosts.protocol import Host

from .drawing import Drawn, changed, noise_of

Part = tuple[Lora | None, Sequence[str]]
"""What denoises a region of the pictures: a LoRA, and a prompt for each picture."""


def by_windows(
    sample: Tensor, axis: int, width: int, denoise: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """What ``denoise``, called with a region's number and a window, predicts of ``sample``.

    Regions lie side by side along ``axis``, half a ``width`` each. A window is as wide as the
    model's own pictures, ``width``, and holds two neighbours, of which each has its prediction from
    its own call; what two windows say of one region is averaged, as in MultiDiffusion (Bar-Tal et
    al. 2023, equation 5). Two regions have one window, which is the whole picture.
    """
    half = width // 2
    regions = sample.shape[axis] // half
    found = torch.zeros_like(sample)
    for start in range(regions - 1):
        window = sample.narrow(axis, start * half, width)
        for place in (0, 1):
            predicted = denoise(start + place, window).narrow(axis, place * half, half)
            found.narrow(axis, (start + place) * half, half).add_(predicted)
    found.narrow(axis, half, (regions - 2) * half).div_(2)
    return found


def ring(names: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """Each ``count`` neighbours, those across the end as well."""
    twice = [*names, *names]
    return [tuple(twice[start : start + count]) for start in range(len(names))]


def stable_diffusion(
    pipeline: Any,
    host: Host,
    parts: Sequence[Part],
    pictures: Sequence[Drawn],
    size: int,
    **options: Any,
) -> list[Image.Image]:
    """Pictures ``size`` pixels high, half as wide for each of ``parts``, which denoise their
    regions at every step, each with its LoRA and prompts; ``options`` are the pipeline's own."""
    words: list[Any] = []
    for lora, prompts in parts:
        with changed(host, lora):
            words.append(pipeline.encode_prompt(prompts, pipeline.device, 1, True))
    plain = pipeline.unet.forward

    def whole(sample: Tensor, timestep: Any, **given: Any) -> tuple[Tensor]:
        def denoise(part: int, window: Tensor) -> Tensor:
            positive, negative = words[part]
            given["encoder_hidden_states"] = torch.cat([negative, positive])
            with changed(host, parts[part][0]):
                return plain(window, timestep, **given)[0]

        return (by_windows(sample, -1, pipeline.unet.config.sample_size, denoise),)

    with patch.object(pipeline.unet, "forward", whole):
        return pipeline(
            prompt_embeds=words[0][0],
            negative_prompt_embeds=words[0][1],
            generator=[noise_of(one) for one in pictures],
            height=size,
            width=size * len(parts) // 2,
            **options,
        ).images
