"""Pictures of one thing each, encoded once, with the states of two captions of each."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from toybox import draw
from toybox.train.common import bf16, to_tensor

from ..captions import caption
from ..pipeline import load_autoencoder, load_text_encoder, load_tokenizer

log = logging.getLogger(__name__)
SHARDS, SHARD_SIZE, CAPTIONS, PATTERNED, BATCH = 6, 2048, 2, 0.25, 64


def scenes_of(index: int) -> tuple[list[draw.Scene], np.random.Generator]:
    """The scenes of a shard, and the generator that goes on to their captions."""
    rng = np.random.default_rng(40_000 + index)
    return [draw.random_scene(rng, PATTERNED, two=0.0) for _ in range(SHARD_SIZE)], rng


@torch.no_grad()
def shard(work: Path, index: int) -> dict[str, torch.Tensor]:
    """``latents`` (N, 4, 8, 8) float32 and ``states`` (N, 2, 32, 384) bfloat16, made unless they
    are there."""
    path = work / "latents" / f"{index:02d}.safetensors"
    if path.exists():
        return load_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    vae, encoder, tokenizer = load_autoencoder(), load_text_encoder(), load_tokenizer()
    scenes, rng = scenes_of(index)
    captions = [caption(scene, rng) for scene in scenes for _ in range(CAPTIONS)]
    latents, states = [], []
    for first in range(0, SHARD_SIZE, BATCH):
        pictures = to_tensor(draw.draw(s, rng) for s in scenes[first : first + BATCH])
        texts = captions[CAPTIONS * first : CAPTIONS * (first + BATCH)]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        with bf16():
            latents.append(vae.encoder(pictures).float())
            states.append(encoder(tokens.input_ids)[0].bfloat16())
    made = {
        "latents": torch.cat(latents).contiguous(),
        "states": torch.cat(states).unflatten(0, (-1, CAPTIONS)).contiguous(),
    }
    partial = path.with_suffix(".part")
    save_file(made, partial)
    partial.replace(path)
    log.info("latents: shard %d of %d; %s", index + 1, SHARDS, captions[0])
    return made


@torch.no_grad()
def empty_states() -> torch.Tensor:
    """The states of the empty caption, (32, 384), for guidance."""
    tokens = load_tokenizer()([""], padding="max_length", return_tensors="pt")
    return load_text_encoder()(tokens.input_ids)[0][0]
