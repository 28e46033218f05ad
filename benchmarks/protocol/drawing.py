"""Pictures of a pipeline with a LoRA on its weights, always of the same noise."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from PIL import Image

from iteris_core import Lora
from iteris_core.hosts.protocol import Host


class Drawn(Protocol):
    """What drawing needs to know of a picture."""

    @property
    def prompt(self) -> str: ...
    @property
    def seed(self) -> int: ...


def draw(
    pipeline: Any,
    host: Host,
    lora: Lora | None,
    pictures: Sequence[Drawn],
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


def noise_of(picture: Drawn) -> torch.Generator:
    """Its noise depends on the prompt too, so that no two prompts share a picture."""
    digest = hashlib.sha256(f"{picture.prompt}{picture.seed}".encode()).hexdigest()
    return torch.Generator().manual_seed(int(digest[:8], 16))


@contextmanager
def changed(host: Host, lora: Lora | None) -> Generator[None]:
    """The LoRA's changes added to the weights, which are put back bit for bit."""
    sites = host.sites()
    kept = {s: sites[s].weight.data.clone() for s in (lora.sites if lora else {})}
    try:
        for site, change in (lora.sites if lora else {}).items():
            weight = sites[site].weight.data
            weight += change.dense().reshape(weight.shape)
        yield
    finally:
        for site, weight in kept.items():
            sites[site].weight.data.copy_(weight)
