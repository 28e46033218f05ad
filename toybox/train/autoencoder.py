"""The steps `ae` and `decoder`: an AutoencoderTiny in TAESD's shape on the world's pictures.

Each latent channel is pulled to mean 0 and deviation 1, so `scaling_factor` is 1. Noise on the
latents while training makes the decoder forgiving. `ae` trains both halves in two rounds; `decoder`
goes on with the decoder alone, which leaves latents, and a base model trained on them, as they are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

from .common import Average, Run, bf16, random_pictures

log = logging.getLogger(__name__)
CROP_BATCH = 24


@dataclass(frozen=True)
class Round:
    """One training run: its folder's name, size, and whether the encoder learns too."""

    name: str
    steps: int
    batch: int
    peak: float
    joint: bool
    seed: int
    two: float
    noise: float = 0.15  # mean standard deviation of the noise added to latents while training
    crop: int = 0  # three steps of four see crops of this size around a thing, in larger batches


JOINT = (
    Round("ae", 2600, 16, 1e-3, True, 11, 0.4),
    Round("ae2", 3000, 8, 1e-3, True, 12, 0.5),
    Round("ae3", 2900, 8, 8e-4, True, 14, 0.5, noise=0.1, crop=32),
)
DECODER = Round("decoder", 3600, 8, 6e-4, False, 13, 0.5, noise=0.15, crop=32)


def train(work: Path, weights: Path) -> dict:
    """Train both halves and save into `weights`/base/vae; returns figures for quality.json."""
    model = None
    seconds = 0.0
    for part in JOINT:
        model = model or new_autoencoder()
        seconds += _train(model, part, work, weights)
    return {"ae_seconds": round(seconds), "ae_mean_error": measure(model)}


def train_decoder(work: Path, weights: Path) -> dict:
    """Go on with the decoder alone, from the weights saved by `train`."""
    model = AutoencoderTiny.from_pretrained(weights / "base" / "vae")
    model.requires_grad_(True)
    model.encoder.requires_grad_(False)
    seconds = _train(model, DECODER, work, weights)
    return {"decoder_seconds": round(seconds), "decoder_mean_error": measure(model)}


def new_autoencoder() -> AutoencoderTiny:
    """TAESD's default layout with a scaling factor of 1."""
    torch.manual_seed(11)
    return AutoencoderTiny(scaling_factor=1.0)


def _train(model: AutoencoderTiny, part: Round, work: Path, weights: Path) -> float:
    """Train `model` in place, ending on the averaged weights; returns seconds taken."""
    model.to(memory_format=torch.channels_last)
    learned = model if part.joint else model.decoder
    optimizer = torch.optim.AdamW(
        learned.parameters(), lr=part.peak, betas=(0.9, 0.98), weight_decay=1e-3, fused=True
    )
    run = Run(
        work / part.name,
        {"vae": model},
        optimizer,
        Average([learned], 0.995),
        part.steps,
        part.peak,
        part.seed,
    )
    for step in range(run.start, part.steps):
        rng, generator = run.generators(step)
        cropped = bool(part.crop and step % 4)
        count = CROP_BATCH if cropped else part.batch
        scenes, pictures = random_pictures(rng, count, patterned=0.6, two=part.two)
        if cropped:
            pictures = _crop(rng, scenes, pictures, part.crop)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        loss, error = rebuilding(model, pictures, part.noise, generator, 0.0 if cropped else 0.1)
        run.descend(step, loss)
        if step % 40 == 0:
            log.info("%s %d/%d %.4f  %.0f s", part.name, step, part.steps, error, run.elapsed)
        if (step + 1) % 200 == 0 or step + 1 == part.steps:
            run.save(step + 1)
            export(run, model, weights)
    run.average.swap()
    return run.elapsed


def rebuilding(
    model: AutoencoderTiny,
    pictures: torch.Tensor,
    noise: float,
    generator: torch.Generator,
    unit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the mean absolute error in it, of pictures rebuilt from latents with noise, of
    the mean deviation `noise`; `unit` weights how far latents are from mean 0 and deviation 1."""
    with bf16():
        latents = model.encoder(pictures).float()
        noises = torch.randn(latents.shape, generator=generator)
        level = noise * torch.rand(len(latents), 1, 1, 1, generator=generator) * 2
        error = model.decoder(latents + level * noises).float() - pictures
    slope = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    mean, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    unlike_unit = mean.square().mean() + (spread - 1).square().mean()
    absolute = error.abs().mean()
    return absolute + 2.0 * error.square().mean() + 0.5 * slope + unit * unlike_unit, absolute


def _crop(rng: np.random.Generator, scenes, pictures: torch.Tensor, size: int) -> torch.Tensor:
    """From each picture a square of `size` pixels around one of its things."""
    parts = []
    for scene, picture in zip(scenes, pictures, strict=True):
        placed = scene.placed[rng.integers(len(scene.placed))]
        corner = [
            int(np.clip(c + rng.uniform(-10, 10) - size / 2, 0, picture.shape[-1] - size))
            for c in (placed.y, placed.x)
        ]
        parts.append(picture[:, corner[0] : corner[0] + size, corner[1] : corner[1] + size])
    return torch.stack(parts)


def export(run: Run, model: AutoencoderTiny, weights: Path) -> None:
    """Save the averaged weights as float16."""
    run.average.swap()
    copy = new_autoencoder()
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(weights / "base" / "vae")
    run.average.swap()


@torch.no_grad()
def measure(model: AutoencoderTiny) -> float:
    """Mean absolute error over 64 unseen pictures, in [0, 1] units."""
    _, pictures = random_pictures(np.random.default_rng(9_999), 64, 0.5, 0.5)
    with bf16():
        rebuilt = model.decoder(model.encoder(pictures)).float()
    return round(float((rebuilt - pictures).abs().mean()) / 2, 5)
