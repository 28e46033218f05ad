"""Images from a pipeline, one for each prompt and seed."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from iteris_core.errors import ScoreError, brief
from iteris_core.hosts.diffusers_loop import is_modular
from iteris_core.progress import Forecast, OnProgress
from iteris_core.settings import Settings, setting


@dataclass(frozen=True)
class Drawing(Settings):
    """Settings for drawing; the paper uses 100 DDPM steps at guidance 12."""

    images_per_prompt: int = setting(4, "Seeds per prompt.", low=1)
    steps: int = setting(25, "Denoising steps of the images.", low=1)
    guidance: float = setting(7.5, "Guidance scale of the images.")
    seed: int = setting(0, "Seed of each prompt's first image, and of the calibration.")
    batch: int = setting(8, "Images per batch.", low=1)
    width: int | None = setting(
        None, "Width of the images in pixels.", none="the pipeline's", low=8
    )
    height: int | None = setting(
        None, "Height of the images in pixels.", none="the pipeline's", low=8
    )


def draw(
    pipeline: Any,
    prompts: Sequence[tuple[str, int]],
    drawing: Drawing,
    on_progress: OnProgress | None = None,
) -> list[Image.Image]:
    """Draw one image for each (prompt, seed)."""
    images: list[Image.Image] = []
    sizes = {"width": drawing.width, "height": drawing.height}
    call = {name: size for name, size in sizes.items() if size is not None}
    call["num_inference_steps"] = drawing.steps
    forecast = Forecast(on_progress)
    forecast.tick("drawing", 0, len(prompts))
    with _guided(pipeline, drawing.guidance):
        for start in range(0, len(prompts), drawing.batch):
            chunk = prompts[start : start + drawing.batch]
            generators = [torch.Generator().manual_seed(seed) for _, seed in chunk]
            try:
                if is_modular(pipeline):  # some draw only one image
                    images += [
                        pipeline(prompt=prompt, generator=generator, output="images", **call)[0]
                        for (prompt, _), generator in zip(chunk, generators, strict=True)
                    ]
                else:
                    images += pipeline(
                        [prompt for prompt, _ in chunk],
                        guidance_scale=drawing.guidance,
                        generator=generators,
                        **call,
                    ).images
            except ValueError as error:  # pipelines raise these for a size, a number of steps, …
                raise ScoreError(
                    f"{type(pipeline).__name__} cannot draw with these settings ({brief(error)})."
                ) from error
            forecast.tick("drawing", len(images), len(prompts))
    return images


@contextmanager
def _guided(pipeline: Any, guidance: float) -> Generator[None]:
    """Context in which a modular pipeline's guider has the scale for drawing."""
    guider: Any = getattr(pipeline, "guider", None)
    if not hasattr(guider, "guidance_scale"):
        yield
        return
    pipeline.guider = copy.deepcopy(guider)
    pipeline.guider.guidance_scale = guidance
    try:
        yield
    finally:
        pipeline.guider = guider
