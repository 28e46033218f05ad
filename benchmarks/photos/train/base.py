"""The step ``base``: a UNet from scratch that reads MiniLM's states; MiniLM stays as it is."""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from minilm.pipeline import load_encoder, load_tokenizer
from minilm.prompts import said
from torch.nn import functional as F

from toybox.draw import BACKGROUNDS
from toybox.pipeline import load_autoencoder, new_scheduler
from toybox.train.base import velocity
from toybox.train.common import Average, Run, bf16, made_once, to_tensor

from .. import WEIGHTS
from ..pipeline import new_unet
from ..things import article, cutouts, picture, world

log = logging.getLogger(__name__)
STEPS = {96: 9000, 48: 3500}
"""Width → steps."""
BATCH, PEAK, EMPTY, SEED = 32, 7e-4, 0.1, 31
SHARDS, SHARD, CAPTIONS, KIND = 8, 4096, 2, 0.15
"""Pictures are encoded once, by shards; a share KIND of the captions names the kind alone."""
SAVE, EXPORT, FALLING = 200, 1000, 0.3


def trapezoid(optimizer: torch.optim.Optimizer, peak: float, steps: int):
    """A short rise, and the last FALLING of the steps down to nothing."""

    def factor(step: int) -> float:
        left = (steps - step) / (FALLING * steps)
        return min((step + 1) / 200, 1.0, max(0.0, left) ** 1.5)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def shard(work: Path, index: int) -> dict[str, torch.Tensor]:
    """``latents`` (N, 4, 16, 16) bfloat16 and ``tokens`` (N, 2, 32)."""
    vae, tokenizer = load_autoencoder(WEIGHTS / "vae"), load_tokenizer()
    cuts, things = cutouts(work / "package"), world()["things"]
    rng = np.random.default_rng(40_000 + index)
    latents: list[torch.Tensor] = []
    captions: list[str] = []
    for _ in range(SHARD // 64):
        pictures = []
        for _ in range(64):
            file, name, kind = things[rng.integers(len(things))]
            background = str(rng.choice(list(BACKGROUNDS)))
            pictures.append(picture(cuts[file], background, rng))
            for _ in range(CAPTIONS):
                captions.append(
                    said(article(kind if rng.random() < KIND else name), background, rng)
                )
        with bf16():
            shown = to_tensor(pictures).contiguous(memory_format=torch.channels_last)
            latents.append(vae.encoder(shown).bfloat16())
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    ids = tokens.input_ids.unflatten(0, (-1, CAPTIONS)).int()
    return {"latents": torch.cat(latents).contiguous(), "tokens": ids.contiguous()}


def train(work: Path, weights: Path, width: int) -> dict[str, float]:
    """Train, or go on; exports the averages as it goes."""
    torch.manual_seed(SEED)
    steps = STEPS[width]
    shards = [
        made_once(work / "latents" / f"{i:02d}.safetensors", partial(shard, work, i))
        for i in range(SHARDS)
    ]
    latents, tokens = (torch.cat([s[key] for s in shards]) for key in ("latents", "tokens"))
    encoder, empty = load_encoder(), load_tokenizer()([""], padding="max_length").input_ids[0]
    unet = new_unet(width).to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=PEAK, betas=(0.9, 0.99), fused=True)
    average, alphas = Average([unet], 0.999), new_scheduler().alphas_cumprod
    run = Run(
        work / f"base-{width}", {"unet": unet}, optimizer, average, steps, PEAK, SEED, trapezoid
    )
    running = 0.0
    for step in range(run.start, steps):
        _, g = run.generators(step)
        rows = torch.randint(len(latents), (BATCH,), generator=g)
        caption = torch.randint(CAPTIONS, (BATCH,), generator=g)
        t = torch.randint(1000, (BATCH,), generator=g)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=g)
        given = tokens[rows, caption].long()
        given[torch.rand(BATCH, generator=g) < EMPTY] = torch.tensor(empty)
        noised, target = velocity(alphas, latents[rows].float(), noise, t)
        with bf16():
            with torch.no_grad():
                states = encoder(given)[0]
            noised = noised.contiguous(memory_format=torch.channels_last)
            predicted = unet(noised, t, states, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), target)
        run.descend(step, loss)
        running = loss.item() if step == run.start else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            log.info("base %d/%d loss %.4f  %.0f s", step, steps, running, run.elapsed)
        if (step + 1) % SAVE == 0 or step + 1 == steps:
            run.save(step + 1)
        if (step + 1) % EXPORT == 0 or step + 1 == steps:
            average.swap()
            copy.deepcopy(unet).to(torch.float16).save_pretrained(weights / "unet")
            average.swap()
    return {"base_seconds": round(run.elapsed), "base_steps": steps, "loss": round(running, 4)}
