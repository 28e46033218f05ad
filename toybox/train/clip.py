"""The step `clip`: an open_clip model on drawn pictures and descriptions of them, full or loose."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from .. import draw
from ..clip import CONTEXT, load, model_config, preprocess_config
from ..tokenizer import build_tokenizer
from .common import Average, Run, bf16
from .judge import spoil

log = logging.getLogger(__name__)
STEPS, BATCH, PEAK = 1100, 128, 2e-3


def train(work: Path, weights: Path) -> dict:
    """Train (or go on) and save into `weights`/clip."""
    import open_clip

    torch.manual_seed(51)
    folder = weights / "clip"
    tokenizer = build_tokenizer(folder)
    config = model_config(len(tokenizer))
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    model = open_clip.CLIP(config["embed_dim"], vision, text)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.02, fused=True
    )
    run = Run(work / "clip", {"clip": model}, optimizer, Average([model], 0.995), STEPS, PEAK, 51)
    model.train()
    for step in range(run.start, STEPS):
        rng, _ = run.generators(step)
        scenes = [draw.random_scene(rng, patterned=0.55, two=0.4) for _ in range(BATCH)]
        captions = [draw.caption(s, rng, partial(describe_loosely, rng=rng)) for s in scenes]
        pictures = spoil(rng, [draw.draw(s, rng) for s in scenes])
        tokens = tokenizer(
            captions, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
        ).input_ids
        with bf16():
            image = F.normalize(model.encode_image(pictures).float(), dim=-1)
            words = F.normalize(model.encode_text(tokens).float(), dim=-1)
        logits = model.logit_scale.exp() * image @ words.T
        target = torch.arange(BATCH)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        run.descend(step, loss)
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.0)
        if step % 50 == 0:
            right = (logits.argmax(0) == target).float().mean().item()
            log.info(
                "clip %d/%d loss %.3f top-1 of %d %.3f  %.0f s",
                step,
                STEPS,
                loss.item(),
                BATCH,
                right,
                run.elapsed,
            )
        if (step + 1) % 300 == 0 or step + 1 == STEPS:
            run.save(step + 1)
            run.average.swap()
            export(model, config, folder)
            run.average.swap()
    return {"clip_seconds": round(run.elapsed), "clip_top1_of_32": measure(folder)}


def describe_loosely(thing: draw.Thing, rng: np.random.Generator) -> str:
    """A caption as people write it: every attribute, or one colour and the shape, or just the
    shape.

    Without the last kind, "a star on a white background" would score low for any patterned star. So
    would every good image of a concept once the rare token is removed from its prompt.
    """
    detail = rng.random()
    if detail < 0.6:
        return draw.describe(thing)
    return thing.shape if detail < 0.85 else f"{thing.color1} {thing.shape}"


def export(model, config: dict, folder: Path) -> None:
    """Save configuration and float16 weights as open_clip's local-dir scheme reads them."""
    layout = {"model_cfg": config, "preprocess_cfg": preprocess_config()}
    (folder / "open_clip_config.json").write_text(json.dumps(layout, indent=2) + "\n")
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    tensors = {k: v.contiguous() for k, v in tensors.items() if k != "attn_mask"}
    save_file(tensors, folder / "open_clip_model.safetensors")


@torch.no_grad()
def measure(folder: Path, rounds: int = 20) -> float:
    """Text-to-image retrieval: top-1 of 32 unseen pictures, mean over `rounds` sets."""
    model, preprocess, tokenizer = load(folder)
    rng, right = np.random.default_rng(5_151), []
    for _ in range(rounds):
        scenes = [draw.random_scene(rng, 0.55, 0.4) for _ in range(32)]
        pictures = torch.stack([preprocess(draw.draw(s, rng)) for s in scenes])
        words = tokenizer([draw.caption(s, None, draw.describe) for s in scenes])
        image = F.normalize(model.encode_image(pictures), dim=-1)
        text = F.normalize(model.encode_text(words), dim=-1)
        right.append(((text @ image.T).argmax(1) == torch.arange(32)).float().mean().item())
    return round(float(np.mean(right)), 4)
