"""The steps `base` and `finish`: denoiser and text encoders from scratch, by flow matching.

`base` trains at a steady rate for as long as it is let; `finish` goes on from its checkpoint with a
falling rate, in a folder of its own, so that `base` can go on as well.
"""

from __future__ import annotations

import copy
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from toybox.train.common import Average, Run, bf16, step_of

from ..tokenizer import tokens
from .autoencoder import load_encoder
from .families import FAMILIES, Captions, Family, Models
from .latents import SHARDS, Shards
from .optimizers import PEAK, falling, optimizers, steady
from .place import Place

log = logging.getLogger(__name__)
STEPS, FINISH, SEED, DROPPED = 12_000, 1_500, 31, 0.1
SAVE, EXPORT = 100, 500
TIMES = (0.5, 1.4)
"""Mean and deviation of the logit of the noise's share. Wider than SD 3's (0, 1), which hardly ever
sees the pure noise that a picture begins with, where it is decided what will be in it."""

PLAIN = SDPBackend.MATH  # on a CPU the fused kernel's backward pass is far slower in bfloat16


def train(place: Place, steps: int = STEPS) -> dict:
    """Train (or go on) up to `steps` at a steady rate; exports the averages as it goes."""
    run, models, parts = _begin(place, "base", steps, steady)
    _fit(place, run, models, parts)
    return {"seconds": round(run.elapsed), "steps": run.steps}


def finish(place: Place, steps: int = FINISH) -> dict:
    """From the checkpoint of `base`, `steps` at a falling rate."""
    folder = place.work / "finish"
    begun = folder / "begun.safetensors"
    if not begun.exists():
        folder.mkdir(exist_ok=True)
        copied = shutil.copy(place.work / "base" / "state.safetensors", folder / "copy.part")
        shutil.copy(copied, folder / "state.safetensors")
        Path(copied).rename(begun)
    first = step_of(begun)
    run, models, parts = _begin(place, "finish", first + steps, partial(falling, begun=first))
    _fit(place, run, models, parts)
    return {"seconds": round(run.elapsed), "steps": run.steps, "falling": steps}


def new_models(family: Family, tokenizers: tuple[Any, Any]) -> Models:
    """Denoiser and text encoders, begun as diffusion transformers are: blocks that do nothing."""
    transformer: Any = family.transformer()
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear")):
                nn.init.zeros_(module.weight)
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    encoders: Any = family.encoders(*tokenizers)
    for name, encoder in zip(family.parts, encoders, strict=True):
        if name != "t5":
            encoder.set_attn_implementation("eager")
    return {"transformer": transformer, **dict(zip(family.parts, encoders, strict=True))}


def shards_at(step: int) -> int:
    """How many shards are drawn from: one more now and then, since each takes a while."""
    return min(SHARDS, 4 + step // 1000)


def velocity_loss(
    family: Family, models: Models, latents: Tensor, captions: Captions, generator: torch.Generator
) -> Tensor:
    """Flow matching's error, times drawn by a logit-normal."""
    rows = len(latents)
    noise = torch.randn(latents.shape, generator=generator)
    sigma = torch.sigmoid(TIMES[0] + TIMES[1] * torch.randn(rows, generator=generator))
    level = sigma.view(-1, 1, 1)
    noised = (1 - level) * latents + level * noise
    with bf16(), sdpa_kernel(PLAIN):
        predicted = family.velocity(models, noised, sigma, captions)
    return F.mse_loss(predicted.float(), noise - latents)


def _begin(place: Place, name: str, steps: int, schedule):
    torch.manual_seed(SEED)
    shards = Shards(place)
    family = FAMILIES[place.family]
    models = new_models(family, shards.tokenizers)
    if place.family != "flux":  # what words mean is learned already
        flux = FAMILIES["flux"].load(place.weights / "base")
        models["t5"].load_state_dict(flux.text_encoder_2.state_dict())
    encoders = [model for name, model in models.items() if name != "transformer"]
    average = Average(list(models.values()), 0.9995)
    made = optimizers(models["transformer"], encoders, muon=family.muon)
    run = Run(place.work / name, models, made, average, steps, PEAK, SEED, schedule)
    return run, models, shards


def _fit(place: Place, run: Run, models: Models, shards: Shards) -> None:
    family = FAMILIES[place.family]
    empty = tokens(shards.tokenizers, [""])
    vae = load_encoder(place)
    pool: list[dict[str, Tensor]] = []
    latents = clip = words = torch.empty(0)
    running = 0.0
    for step in range(run.start, run.steps):
        wanted = shards_at(step)
        if len(pool) < wanted:
            pool += [shards.get(index) for index in range(len(pool), wanted)]
            latents, clip, words = (
                torch.cat([shard[key] for shard in pool]) for key in ("latents", "clip", "words")
            )
        _, generator = run.generators(step)
        rows = torch.randint(len(latents), (family.batch,), generator=generator)
        dropped = torch.rand(family.batch, 1, generator=generator) < DROPPED
        captions = (
            torch.where(dropped, empty[0], clip[rows].long()),
            torch.where(dropped, empty[1], words[rows].long()),
        )
        loss = velocity_loss(family, models, latents[rows].float(), captions, generator)
        run.descend(step, loss)
        running = loss.item() if step == run.start else 0.98 * running + 0.02 * loss.item()
        if step % 20 == 0:
            log.info("%s %d loss %.4f  %.0f s", run.folder.name, step, running, run.elapsed)
        last = step + 1 == run.steps
        if (step + 1) % SAVE == 0 or last:
            run.save(step + 1)
        if (step + 1) % EXPORT == 0 or last:
            run.average.swap()
            export(family, pipeline_of(family, models, vae, shards.tokenizers), place.weights)
            run.average.swap()
            note = {"seconds": round(run.elapsed), "steps": step + 1, "loss": round(running, 4)}
            place.note(run.folder.name, note)


def pipeline_of(family: Family, models: Models, vae: Any, tokenizers: Any) -> Any:
    """The models as they are, as a pipeline with a copy of the denoiser."""
    transformer = type(models["transformer"]).from_config(models["transformer"].config)
    transformer.load_state_dict(models["transformer"].state_dict())
    return family.assemble(
        vae, transformer, tuple(models[name] for name in family.parts), tokenizers
    )


def export(family: Family, pipeline: Any, weights: Path) -> None:
    """Save everything but the autoencoder, which is there already, as float16."""
    folder = weights / family.folder
    for name in ("transformer", *family.parts.values()):
        half = copy.deepcopy(getattr(pipeline, name)).to(torch.float16)
        half.save_pretrained(folder / name)
        # transformers loads in the dtype that the configuration names, diffusers in float32
        path = folder / name / "config.json"
        path.write_text(path.read_text().replace('"float16"', '"float32"'))
    encoders = family.parts.values()
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
    for name in ("scheduler", *tokenizers):
        getattr(pipeline, name).save_pretrained(folder / name)
    pipeline.save_config(folder)
    # Loadable by anybody's pipeline, which only has other defaults, and by transformers 4.
    theirs = type(pipeline).__mro__[1].__name__
    for file, own, other in (
        ("model_index.json", type(pipeline).__name__, theirs),
        ("model_index.json", "TokenizersBackend", "PreTrainedTokenizerFast"),
        (f"{tokenizers[-1]}/tokenizer_config.json", "TokenizersBackend", "PreTrainedTokenizerFast"),
    ):
        path = folder / file
        path.write_text(path.read_text().replace(f'"{own}"', f'"{other}"'))
