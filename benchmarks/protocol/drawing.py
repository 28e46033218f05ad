"""Pictures of a pipeline with a LoRA on its weights, always of the same noise."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from iteris_core import Lora
from iteris_core.hosts.protocol import Host

from .world import Wanted


def draw(
    pipeline: Any,
    host: Host,
    lora: Lora | None,
    pictures: Sequence[Wanted],
    batch: int = 32,
    **options: Any,
) -> list[Image.Image]:
    """One picture for each of ``pictures``; ``options`` are the pipeline's own."""
    images: list[Image.Image] = []
    with changed(host, lora):
        for start in range(0, len(pictures), batch):
            some = pictures[start : start + batch]
            prompts = [picture.prompt for picture in some]
            generators = [noise_of(picture) for picture in some]
            images += pipeline(prompts, generator=generators, **options).images
    return images


def noise_of(picture: Wanted) -> torch.Generator:
    """Its noise depends on the prompt too, so that no two prompts share a picture."""
    digest = hashlib.sha256(f"{picture.prompt}{picture.seed}".encode()).hexdigest()
    return torch.Generator().manual_seed(int(digest[:8], 16))


def scenes_of(
    images: Sequence[Image.Image],
    wanted: Sequence[Wanted],
    colours: Mapping[str, tuple[int, int, int]],
    near: float,
) -> list[float]:
    """1 for each picture with the background that is wanted, or of which none is: that whose colour
    is the nearest to the outermost two pixels, within ``near`` levels of 255."""
    found: list[float] = []
    for image, picture in zip(images, wanted, strict=True):
        pixels = np.asarray(image.convert("RGB"), dtype=float)
        inner = np.zeros(pixels.shape[:2], dtype=bool)
        inner[2:-2, 2:-2] = True  # things stand in the middle
        edge = np.median(pixels[~inner], axis=0)
        away = {name: float(np.linalg.norm(edge - colour)) for name, colour in colours.items()}
        nearest = min(away, key=lambda name: away[name])
        right = picture.scene == nearest and away[nearest] < near
        found.append(float(right or not picture.scene))
    return found


@contextmanager
def changed(host: Host, lora: Lora | None) -> Generator[None]:
    """The LoRA's changes added to the weights, which are put back bit for bit."""
    sites, changes = host.sites(), lora.sites if lora else {}
    kept = {site: sites[site].weight.data.clone() for site in changes}
    try:
        for site, change in changes.items():
            weight = sites[site].weight.data
            weight += change.dense().reshape(weight.shape)
        yield
    finally:
        for site, weight in kept.items():
            sites[site].weight.data.copy_(weight)
