"""The step `latents`: pictures for the base, encoded once, in shards with their captions' tokens.

No held-out name is among them, and no caption tells the artist.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from toybox.train.common import bf16, to_tensor

from .. import draw
from ..pipeline import EmojiPipeline
from ..sources import drawings, world
from ..tokenizer import clip_tokenizer, tokens, word_tokenizer
from .autoencoder import load_encoder
from .place import Place

log = logging.getLogger(__name__)
SHARDS, SIZE, TWO = 12, 4096, 0.35
SIDE = 16
"""Of a latent; the denoiser sees (SIDE / 2)² tokens."""


class Shards:
    """The shards of a work folder; those that are missing are made when they are asked for."""

    def __init__(self, place: Place):
        self.place = place
        self.tokenizers = (
            clip_tokenizer(place.weights / "base" / "tokenizer"),
            word_tokenizer(),
        )
        self._vae: Any = None
        self._drawings: Any = None

    def path(self, index: int) -> Path:
        """Where shard `index` is or will be."""
        return self.place.work / "latents" / f"{index:02d}.safetensors"

    def get(self, index: int) -> dict[str, Tensor]:
        """`latents` (N, 64, 16) in bfloat16, and the captions' tokens `clip` and `words`."""
        path = self.path(index)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".part")
            save_file(self._make(index), partial)
            partial.replace(path)
            log.info("latents: shard %d of %d", index + 1, SHARDS)
        return load_file(path)

    @torch.no_grad()
    def _make(self, index: int) -> dict[str, Tensor]:
        self._vae = self._vae or load_encoder(self.place)
        self._drawings = self._drawings or drawings(self.place.cache)
        rng = np.random.default_rng(20_000 + index)
        names, artists = list(world()["names"]), range(len(world()["artists"]))
        scenes = [draw.random_scene(rng, names, artists, TWO) for _ in range(SIZE)]
        captions = [draw.caption(scene, rng) for scene in scenes]
        parts: list[Tensor] = []
        for first in range(0, SIZE, 32):
            some = scenes[first : first + 32]
            pictures = to_tensor(draw.draw(scene, self._drawings, rng) for scene in some)
            with bf16():
                pictures = pictures.contiguous(memory_format=torch.channels_last)
                parts.append(pack(self._vae.encoder(pictures)).bfloat16())
        clip, words = tokens(self.tokenizers, captions)
        made = {"latents": torch.cat(parts), "clip": clip.int(), "words": words.int()}
        return {name: tensor.contiguous() for name, tensor in made.items()}


def pack(latents: Tensor) -> Tensor:
    """Latents as the denoiser's tokens, two by two of them in one."""
    return EmojiPipeline._pack_latents(latents, *latents.shape)


def train(place: Place, limit: float = 480.0) -> dict:
    """Make the missing shards, for `limit` seconds at most; run it again for the rest."""
    began, shards = time.time(), Shards(place)
    for index in range(SHARDS - 1, -1, -1):  # the base step begins at the other end
        if not shards.path(index).exists() and time.time() - began < limit:
            shards.get(index)
    made = sum(shards.path(index).exists() for index in range(SHARDS))
    return {"shards": made, "pictures": made * SIZE}
