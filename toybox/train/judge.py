"""The step `judge`: the classifier of drawn attributes, made robust to blur, noise and the
autoencoder's errors."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch.nn import functional as F

from .. import draw
from ..judge import HEADS, Judge, JudgeNet, halves
from ..pipeline import load_autoencoder
from .common import Average, Run, bf16, to_tensor

log = logging.getLogger(__name__)
STEPS, BATCH, PEAK, POOL = 2200, 64, 2e-3, 2048


def sample(rng: np.random.Generator, count: int) -> tuple[list[Image.Image], torch.Tensor]:
    """`count` pictures with one thing each (a third are halves of two), and their labels."""
    pictures, labels = [], []
    while len(pictures) < count:
        scene = draw.random_scene(rng, patterned=0.65, two=0.2)
        picture = draw.draw(scene, rng)
        cut = [picture] if len(scene.placed) == 1 else halves(picture)
        for part, placed in zip(cut, scene.placed, strict=True):
            pictures.append(part)
            thing = placed.thing
            values = (thing.shape, thing.pattern, thing.color1, thing.color2, scene.background)
            labels.append([HEADS[k].index(v) for k, v in zip(HEADS, values, strict=True)])
    return pictures[:count], torch.tensor(labels[:count])


@torch.no_grad()
def rebuilt_pool(work: Path, weights: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures passed through the autoencoder with a little noise on the latents."""
    vae = load_autoencoder(weights / "base" / "vae")
    pictures, labels = sample(np.random.default_rng(41), POOL)
    parts, generator = [], torch.Generator().manual_seed(41)
    for first in range(0, POOL, 32):
        with bf16():
            batch = to_tensor(pictures[first : first + 32])
            latents = vae.encoder(batch.contiguous(memory_format=torch.channels_last)).float()
            latents += 0.1 * torch.randn(latents.shape, generator=generator)
            parts.append(vae.decoder(latents).float().clamp(-1, 1).to(torch.bfloat16))
    return torch.cat(parts), labels


def spoil(rng: np.random.Generator, pictures: list[Image.Image]) -> torch.Tensor:
    """The pictures as a tensor, some blurred, some noisy."""
    blurred = [
        p.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.2))) if rng.random() < 0.4 else p
        for p in pictures
    ]
    tensor = to_tensor(blurred)
    each = (len(pictures), 1, 1, 1)
    level = rng.uniform(0, 0.12, each) * (rng.random(each) < 0.5)
    noise = rng.standard_normal(tensor.shape, dtype=np.float32) * level.astype(np.float32)
    return tensor + torch.from_numpy(noise)


def train(work: Path, weights: Path) -> dict:
    """Train (or go on) and save into `weights`/judge."""
    torch.manual_seed(41)
    network = JudgeNet()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK, weight_decay=0.02, fused=True)
    run = Run(
        work / "judge", {"judge": network}, optimizer, Average([network], 0.995), STEPS, PEAK, 41
    )
    pool, pool_labels = rebuilt_pool(work, weights)
    for step in range(run.start, STEPS):
        rng, generator = run.generators(step)
        drawn, labels = sample(rng, BATCH * 5 // 8)
        rows = torch.randint(POOL, (BATCH * 3 // 8,), generator=generator)
        batch = torch.cat([spoil(rng, drawn), pool[rows].float()])
        labels = torch.cat([labels, pool_labels[rows]])
        with bf16():
            logits = network(batch.contiguous(memory_format=torch.channels_last))
        loss = sum(F.cross_entropy(logits[k].float(), labels[:, i]) for i, k in enumerate(HEADS))
        run.descend(step, loss)
        if step % 50 == 0:
            right = [
                (logits[k].argmax(1) == labels[:, i]).float().mean().item()
                for i, k in enumerate(HEADS)
            ]
            log.info(
                "judge %d/%d loss %.3f right %s  %.0f s",
                step,
                STEPS,
                loss.item(),
                np.round(right, 2),
                run.elapsed,
            )
        if (step + 1) % 500 == 0 or step + 1 == STEPS:
            run.save(step + 1)
            run.average.swap()
            folder = weights / "judge"
            folder.mkdir(parents=True, exist_ok=True)
            save_file(
                {k: v.half().contiguous() for k, v in network.state_dict().items()},
                folder / "judge.safetensors",
            )
            run.average.swap()
    run.average.swap()
    return {"judge_seconds": round(run.elapsed), **measure(Judge(network))}


def measure(judge: Judge) -> dict[str, float]:
    """Share of attributes read correctly on 500 unseen drawn images."""
    pictures, labels = sample(np.random.default_rng(4_141), 500)
    read = judge.read(pictures)
    figures = {}
    for i, name in enumerate(HEADS):
        right = [getattr(r, name) == HEADS[name][labels[n, i]] for n, r in enumerate(read)]
        figures[f"judge_{name}"] = float(np.mean(right))
    return figures
