"""Images from a pipeline, one for each prompt and seed."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..errors import ScoreError, brief
from ..hosts.diffusers_loop import is_modular
from ..progress import Forecast, OnProgress
from ..settings import Settings, setting


@dataclass(frozen=True)
class Drawing(Settings):
    """Settings for drawing; the paper uses 100 DDPM steps at guidance 12.

    ``scheduler`` names a diffusers class, with or without the suffix "Scheduler"; None keeps the
    pipeline's own. ``size`` is (width, height) in pixels; None leaves it to the pipeline.
    """

    images_per_prompt: int = setting(4, "Seeds per prompt.", low=1)
    steps: int = setting(25, "Denoising steps of the images.", low=1)
    guidance: float = setting(7.5, "Guidance scale of the images.")
    seed: int = setting(0, "Seed of each prompt's first image, and of the calibration.")
    batch: int = setting(8, "Images per batch.", low=1)
    scheduler: str | None = None
    size: tuple[int, int] | None = None


def draw(
    pipeline: Any,
    prompts: Sequence[tuple[str, int]],
    drawing: Drawing,
    on_progress: OnProgress | None = None,
) -> list[Image.Image]:
    """Draw one image for each (prompt, seed)."""
    images: list[Image.Image] = []
    forecast = Forecast(on_progress)
    forecast.tick("drawing", 0, len(prompts))
    with _settled(pipeline, drawing):
        for start in range(0, len(prompts), drawing.batch):
            chunk = prompts[start : start + drawing.batch]
            try:
                images += _drawn(pipeline, chunk, drawing)
            except ValueError as error:  # pipelines raise these for a size, a number of steps, …
                raise ScoreError(
                    f"{type(pipeline).__name__} cannot draw with these settings ({brief(error)})."
                ) from error
            forecast.tick("drawing", len(images), len(prompts))
    return images


def _drawn(pipeline: Any, chunk: Sequence[tuple[str, int]], drawing: Drawing) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed) for _, seed in chunk]
    call = {"num_inference_steps": drawing.steps}
    if drawing.size is not None:
        call["width"], call["height"] = drawing.size
    if is_modular(pipeline):  # some draw only one image
        return [
            pipeline(prompt=prompt, generator=generator, output="images", **call)[0]
            for (prompt, _), generator in zip(chunk, generators, strict=True)
        ]
    prompts = [prompt for prompt, _ in chunk]
    return pipeline(prompts, guidance_scale=drawing.guidance, generator=generators, **call).images


def find_scheduler(name: str) -> Any:
    """The diffusers class ``name``, with or without its suffix."""
    import diffusers

    whole = name if name.endswith("Scheduler") else f"{name}Scheduler"
    known = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")]
    match = next((n for n in known if n.lower() == whole.lower()), None)
    if match is None:
        names = ", ".join(n.removesuffix("Scheduler") for n in known)
        raise ScoreError(f"There is no scheduler {name!r} in diffusers; the names are {names}.")
    return getattr(diffusers, match)


@contextmanager
def _settled(pipeline: Any, drawing: Drawing) -> Generator[None]:
    """Context in which the pipeline has another scheduler, and its guider the scale for drawing."""
    before = {n: getattr(pipeline, n) for n in ("scheduler", "guider") if hasattr(pipeline, n)}
    if drawing.scheduler is not None:
        kind = find_scheduler(drawing.scheduler)
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    if hasattr(before.get("guider"), "guidance_scale"):
        pipeline.guider = copy.deepcopy(pipeline.guider)
        pipeline.guider.guidance_scale = drawing.guidance
    try:
        yield
    finally:
        for name, part in before.items():
            setattr(pipeline, name, part)
