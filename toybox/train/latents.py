"""Pictures for the base model, encoded once: shards of latents and tokenised captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

from .. import draw
from ..pipeline import load_autoencoder
from ..tokenizer import build_tokenizer
from .common import bf16, made_once, to_tensor

SHARDS, SHARD_SIZE, EMPTY = 12, 4096, 0.1
PATTERNED, TWO = 0.25, 0.55


def shard(work: Path, index: int, vae: AutoencoderTiny, tokenizer) -> dict[str, torch.Tensor]:
    """Shard `index`: `latents` (N, 4, 8, 8) and `tokens` (N, 77), made unless already there."""
    path = work / "latents" / f"{index:02d}.safetensors"
    return made_once(path, lambda: _made(index, vae, tokenizer))


@torch.no_grad()
def _made(index: int, vae: AutoencoderTiny, tokenizer) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(20_000 + index)
    scenes = [draw.random_scene(rng, PATTERNED, TWO) for _ in range(SHARD_SIZE)]
    captions = ["" if rng.random() < EMPTY else draw.caption(s, rng) for s in scenes]
    parts = []
    for first in range(0, SHARD_SIZE, 32):
        pictures = to_tensor(draw.draw(s, rng) for s in scenes[first : first + 32])
        with bf16():
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            parts.append(vae.encoder(pictures).float())
    tokens = tokenizer(
        captions, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return {"latents": torch.cat(parts).contiguous(), "tokens": tokens.to(torch.int32)}


def train(work: Path, weights: Path) -> dict:
    """The step `latents`: makes every shard (the base step makes those that are missing)."""
    vae = load_autoencoder(weights / "base" / "vae")
    tokenizer = build_tokenizer(weights / "base" / "tokenizer")
    order = [*range(1, SHARDS), 0]  # so that the base step, begun at once, makes shard 0 itself
    deviations = [shard(work, i, vae, tokenizer)["latents"].std() for i in order]
    return {"latent_deviation": round(float(torch.stack(deviations).mean()), 4)}
