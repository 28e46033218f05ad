"""The step `judges`: an open_clip model on the world's pictures, held-out things among them.

It says how well a picture fits its caption; the judge of what is drawn is the independent one.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from torch.nn import functional as F

from toybox.clip import CONTEXT, load, model_config
from toybox.train.clip import export
from toybox.train.common import Average, Run, bf16
from toybox.train.judge import spoil

from .. import draw
from ..sources import drawings, world
from ..tokenizer import clip_tokenizer
from .place import Place

log = logging.getLogger(__name__)
STEPS, BATCH, PEAK, SEED, TWO = 2400, 128, 2e-3, 51, 0.35


def train(place: Place, limit: float = 480.0) -> dict:
    """Train (or go on) for `limit` seconds at most; run it again for the rest."""
    import open_clip

    torch.manual_seed(SEED)
    began, shown, folder = time.time(), drawings(place.cache), place.weights / "clip"
    tokenizer = clip_tokenizer(folder)
    config = model_config(len(tokenizer))
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    model = open_clip.CLIP(config["embed_dim"], vision, text).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.02, fused=True
    )
    average = Average([model], 0.995)
    run = Run(place.work / "clip", {"clip": model}, optimizer, average, STEPS, PEAK, SEED)
    step = run.start
    while step < STEPS and time.time() - began < limit:
        rng, _ = run.generators(step)
        pictures, captions = sample(rng, shown, BATCH)
        tokens = tokenizer(
            captions, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
        ).input_ids
        with bf16():
            image = F.normalize(model.encode_image(spoil(rng, pictures)).float(), dim=-1)
            words = F.normalize(model.encode_text(tokens).float(), dim=-1)
        logits = model.logit_scale.exp() * image @ words.T
        # Two pictures of a batch may have one caption.
        same = torch.tensor([[a == b for a in captions] for b in captions]).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        run.descend(step, loss)
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.0)
        if step % 50 == 0:
            log.info("clip %d/%d loss %.3f  %.0f s", step, STEPS, loss.item(), run.elapsed)
        step += 1
    run.save(step)
    average.swap()
    export(model, config, folder)
    top1 = measure(place, shown)
    log.info("clip %d/%d top-1 of 32 %.3f", step, STEPS, top1)
    return {"clip_seconds": round(run.elapsed), "clip_steps": step, "clip_top1_of_32": top1}


def sample(rng: np.random.Generator, shown, count: int):
    """Pictures of any names and captions of them, some by kind or without background."""
    artists = range(len(world()["artists"]))
    scenes = [draw.random_scene(rng, list(shown), artists, TWO) for _ in range(count)]
    return [draw.draw(s, shown, rng) for s in scenes], [draw.caption(s, rng) for s in scenes]


@torch.no_grad()
def measure(place: Place, shown, rounds: int = 20) -> float:
    """Text-to-image retrieval: top-1 of 32 other pictures with full captions."""
    model, preprocess, tokenizer = load(place.weights / "clip")
    rng, right = np.random.default_rng(5_151), []
    artists = range(len(world()["artists"]))
    for _ in range(rounds):
        scenes = [draw.random_scene(rng, list(shown), artists, TWO) for _ in range(32)]
        pictures = torch.stack([preprocess(draw.draw(s, shown, rng)) for s in scenes])
        image = F.normalize(model.encode_image(pictures), dim=-1)
        words = F.normalize(model.encode_text(tokenizer([draw.caption(s) for s in scenes])), dim=-1)
        right.append(((words @ image.T).argmax(1) == torch.arange(32)).float().mean().item())
    return round(float(np.mean(right)), 4)
