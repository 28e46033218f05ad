"""Pictures of a pipeline, one for each prompt and seed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..errors import ScoreError, brief
from ..progress import Forecast, OnProgress
from ..settings import Settings, setting
from .compare_progress import DRAWING


@dataclass(frozen=True)
class Drawing(Settings):
    """Settings of the pictures; the paper has 100 steps of DDPM at guidance 12.

    ``scheduler`` is a class of diffusers, by its name with or without "Scheduler" behind it; None
    leaves the pipeline's own. ``size`` is (width, height) in pixels; None leaves it to the
    pipeline.
    """

    images_per_prompt: int = setting(4, "Seeds per prompt.", low=1)
    steps: int = setting(25, "Denoising steps of the pictures.", low=1)
    guidance: float = setting(7.5, "Guidance scale of the pictures.")
    seed: int = setting(0, "Of the first picture of each prompt, and of the calibration.")
    batch: int = setting(8, "Pictures that are drawn at once.", low=1)
    scheduler: str | None = None
    size: tuple[int, int] | None = None


def draw(
    pipeline: Any,
    prompts: Sequence[tuple[str, int]],
    drawing: Drawing,
    on_progress: OnProgress | None = None,
) -> list[Image.Image]:
    """One picture for each (prompt, seed)."""
    images: list[Image.Image] = []
    forecast = Forecast(on_progress)
    forecast.tick(DRAWING, 0, len(prompts))
    size = dict(zip(("width", "height"), drawing.size or (), strict=False))
    with _scheduled(pipeline, drawing.scheduler):
        for start in range(0, len(prompts), drawing.batch):
            chunk = prompts[start : start + drawing.batch]
            try:
                images += pipeline(
                    [prompt for prompt, _ in chunk],
                    num_inference_steps=drawing.steps,
                    guidance_scale=drawing.guidance,
                    generator=[torch.Generator().manual_seed(seed) for _, seed in chunk],
                    **size,
                ).images
            except ValueError as error:  # how pipelines refuse a size, a number of steps, …
                raise ScoreError(
                    f"{type(pipeline).__name__} does not draw with these settings ({brief(error)})."
                ) from error
            forecast.tick(DRAWING, len(images), len(prompts))
    return images


def find_scheduler(name: str) -> Any:
    """The class of diffusers, which ``name`` may give without its ending. Raises
    :class:`IterisError` for what is none."""
    import diffusers

    whole = name if name.endswith("Scheduler") else f"{name}Scheduler"
    known = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")]
    match = next((n for n in known if n.lower() == whole.lower()), None)
    if match is None:
        names = ", ".join(n.removesuffix("Scheduler") for n in known)
        raise ScoreError(f"There is no scheduler {name!r} in diffusers; the names are {names}.")
    return getattr(diffusers, match)


@contextmanager
def _scheduled(pipeline: Any, name: str | None) -> Generator[None]:
    """The pipeline with another scheduler, for as long as that takes."""
    scheduler = pipeline.scheduler
    if name is not None:
        pipeline.scheduler = find_scheduler(name).from_config(scheduler.config)
    try:
        yield
    finally:
        pipeline.scheduler = scheduler
