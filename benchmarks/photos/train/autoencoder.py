"""The step ``autoencoder``: that of the emoji goes on learning, on photographs.

It sees what is held out, too: what a LoRA learns must be drawable. Noise on the latents makes the
decoder forgiving; each latent channel is pulled to mean 0 and deviation 1.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from toybox.draw import BACKGROUNDS
from toybox.pipeline import load_autoencoder
from toybox.train.autoencoder import rebuilding
from toybox.train.common import Average, Run, to_tensor

from ..things import ROOT, SIZE, cutouts, picture

log = logging.getLogger(__name__)
STEPS, PEAK, SEED, WHOLE, CROPS, CROP, NOISE = 2400, 1e-3, 11, 8, 32, 32, 0.1


def train(work: Path, weights: Path, steps: int = STEPS) -> dict[str, float]:
    torch.manual_seed(SEED)
    cuts = list(cutouts(work / "package").values())
    model = load_autoencoder(ROOT.parent / "emoji" / "weights" / "base" / "vae")
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), fused=True)
    average = Average([model], 0.995)
    run = Run(work / "autoencoder", {"vae": model}, optimizer, average, steps, PEAK, SEED)
    for step in range(run.start, steps):
        rng, generator = run.generators(step)
        shown = _pictures(rng, cuts, cropped=step % 4 > 0)
        loss, error = rebuilding(model, shown, NOISE, generator, 0.1)
        run.descend(step, loss)
        if step % 100 == 0:
            log.info("autoencoder %d/%d %.4f  %.0f s", step, steps, error, run.elapsed)
        if (step + 1) % 400 == 0:
            run.save(step + 1)
    average.swap()
    model.eval()
    with torch.no_grad():
        shown = _pictures(np.random.default_rng(9_999), cuts, cropped=False)
        error = (model.decoder(model.encoder(shown)) - shown).abs().mean() / 2
    model.half().save_pretrained(weights / "vae")
    return {"autoencoder_seconds": round(run.elapsed), "mean_error": round(float(error), 4)}


def _pictures(rng: np.random.Generator, cuts: list[Image.Image], *, cropped: bool) -> torch.Tensor:
    shown: list[Image.Image] = []
    for _ in range(CROPS if cropped else WHOLE):
        image = picture(cuts[rng.integers(len(cuts))], str(rng.choice(list(BACKGROUNDS))), rng)
        if cropped:
            x, y = (int(v) for v in rng.integers(0, SIZE - CROP + 1, 2))
            image = image.crop((x, y, x + CROP, y + CROP))
        shown.append(image)
    return to_tensor(shown).contiguous(memory_format=torch.channels_last)
