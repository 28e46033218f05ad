"""The steps `autoencoder` and `decoder`: an AutoencoderTiny of two halvings, on all drawings.

Each latent channel is pulled to mean 0 and deviation 1, so `scaling_factor` is 1; noise on the
latents while training makes the decoder forgiving. Three steps of four see crops, as everything in
it is local. It sees the held-out drawings, too: what a LoRA learns must be drawable.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from toybox.train.common import Average, Run, bf16, to_tensor

from .. import draw
from ..pipeline import new_autoencoder
from ..sources import drawings, world
from .place import Place

log = logging.getLogger(__name__)
STEPS, DECODER, PEAK, SEED = 3200, 4000, 1.5e-3, 11
WHOLE, CROPS, CROP = 8, 32, 32
NOISE = 0.1


def train(place: Place, steps: int = STEPS) -> dict:
    """Train both halves and save into `weights`/base/vae; returns figures for train.json."""
    torch.manual_seed(SEED)
    return _fit(place, "autoencoder", new_autoencoder(), steps, SEED)


def train_decoder(place: Place, steps: int = DECODER) -> dict:
    """Go on with the decoder alone, which leaves latents, and a base that saw them, as they are."""
    model = load_encoder(place)
    model.decoder.requires_grad_(True)
    return _fit(place, "decoder", model, steps, SEED + 1)


def _fit(place: Place, name: str, model: AutoencoderTiny, steps: int, seed: int) -> dict:
    shown = drawings(place.cache)
    model.to(memory_format=torch.channels_last)
    learned = model.decoder if name == "decoder" else model
    optimizer = torch.optim.AdamW(learned.parameters(), lr=PEAK, betas=(0.9, 0.98), fused=True)
    average = Average([learned], 0.995)
    run = Run(place.work / name, {"vae": model}, optimizer, average, steps, PEAK, seed)
    for step in range(run.start, steps):
        rng, generator = run.generators(step)
        cropped = step % 4 > 0
        pictures = random_pictures(rng, shown, CROPS if cropped else WHOLE, cropped)
        with bf16():
            latents = model.encoder(pictures).float()
            noise = torch.randn(latents.shape, generator=generator)
            level = 2 * NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator)
            rebuilt = model.decoder(latents + level * noise).float()
        error = rebuilt - pictures
        slope = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        mean, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        unlike_unit = mean.square().mean() + (spread - 1).square().mean()
        fit = error.abs().mean() + 2.0 * error.square().mean()
        run.descend(step, fit + 0.5 * slope + 0.1 * unlike_unit)
        if step % 100 == 0:
            told = [float(v.detach()) for v in (error.abs().mean(), slope, spread.mean())]
            counted = (name, step, steps, *told, run.elapsed)
            log.info("%s %d/%d mae %.4f slope %.4f std %.2f %.0f s", *counted)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            run.save(step + 1)
            average.swap()
            export(model, place)
            average.swap()
    average.swap()
    return {"seconds": round(run.elapsed), "steps": steps, **measure(model, shown)}


def random_pictures(rng: np.random.Generator, shown, count: int, cropped: bool) -> Tensor:
    """Pictures of random scenes, or as many crops of them, in [-1, 1]."""
    artists = range(len(world()["artists"]))
    names = list(shown)
    pictures = []
    for _ in range(count):
        picture = draw.draw(draw.random_scene(rng, names, artists, 0.5), shown, rng)
        if cropped:
            x, y = (int(v) for v in rng.integers(0, draw.SIZE - CROP + 1, 2))
            picture = picture.crop((x, y, x + CROP, y + CROP))
        pictures.append(picture)
    return to_tensor(pictures).contiguous(memory_format=torch.channels_last)


def export(model: AutoencoderTiny, place: Place) -> None:
    """Save as float16."""
    copy = new_autoencoder()
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(place.weights / "base" / "vae")


def load_encoder(place: Place) -> AutoencoderTiny:
    """The finished autoencoder, ready to encode."""
    vae = AutoencoderTiny.from_pretrained(place.weights / "base" / "vae")
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.no_grad()
def measure(model: AutoencoderTiny, shown) -> dict[str, float]:
    """Mean absolute error over 64 other pictures, in [0, 1] units, and the latents' spread."""
    pictures = random_pictures(np.random.default_rng(9_999), shown, 64, False)
    latents = model.encoder(pictures)
    error = (model.decoder(latents) - pictures).abs().mean() / 2
    return {"mean_error": round(float(error), 5), "deviation": round(float(latents.std()), 3)}
