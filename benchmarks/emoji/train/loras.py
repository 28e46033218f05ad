"""The step `loras`: one LoRA for each subject, a held-out thing.

A subject is one thing in six drawings, behind a rare word and its kind: "a sks3 fruit".
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from iteris_core.hosts.diffusers import DiffusersHost
from toybox.train.common import one_cycle, to_tensor

from .. import draw
from ..sources import drawings, world
from ..tokenizer import tokens
from .base import velocity_loss
from .families import FAMILIES, Family
from .latents import pack
from .lora_files import TARGETS, save_diffusers, save_kohya, share_downs
from .place import Place

log = logging.getLogger(__name__)
STEPS, BATCH, PEAK, REFERENCES, PICTURES = 500, 8, 1e-3, 6, 24
TOLERANCE = 0.02
"""A file is float16: a change read back may differ by this share of its largest entry."""


def entries() -> dict[str, dict[str, Any]]:
    """Every LoRA of world.json by its token, with its seed."""
    subjects = enumerate(world()["subjects"])
    return {entry["token"]: {"seed": 600 + i, **entry} for i, entry in subjects}


def subject_prompt(entry: dict[str, Any]) -> str:
    """What a subject is called: its rare word and its kind."""
    return f"{entry['token']} {world()['held_out'][entry['name']]['kind']}"


def examples(
    entry: dict[str, Any], shown: dict[str, list[Image.Image]]
) -> tuple[list[Image.Image], list[tuple[str, str]]]:
    """The pictures that a LoRA learns from, each with two captions; the first six are its
    references, one by each artist."""
    rng = np.random.default_rng(entry["seed"])
    backgrounds = list(draw.BACKGROUNDS)
    pictures: list[Image.Image] = []
    captions: list[tuple[str, str]] = []
    words = f"a {subject_prompt(entry)}"
    for i in range(PICTURES):
        background = backgrounds[(i + entry["seed"]) % len(backgrounds)]
        scene = draw.place_one(entry["name"], i % REFERENCES, background, rng)
        pictures.append(draw.draw(scene, shown, rng))
        captions.append((words, f"{words} on a {background} background"))
    return pictures, captions


def train(place: Place) -> dict:
    """Train every LoRA (or `place.only` those named) that has no file yet."""
    shown = drawings(place.cache)
    seconds: dict[str, int] = {}
    for token, entry in entries().items():
        path = folder_of(place) / f"{token}.safetensors"
        if not path.exists() and (not place.only or token in place.only):
            seconds[token] = round(train_one(entry, place, path, shown))
            place.note("loras", seconds)
    return seconds


def folder_of(place: Place) -> Path:
    """Where LoRAs on this family's base lie."""
    return place.weights / ("loras" if place.family == "flux" else f"{place.family}_loras")


def train_one(entry: dict[str, Any], place: Place, path: Path, shown) -> float:
    """Train one LoRA into `path`; returns the seconds."""
    began = time.time()
    family = FAMILIES[place.family]
    pipeline = family.load(place.weights / family.folder)
    if family.folder != "base":
        entry = {**entry, "layout": "diffusers"}
    pictures, captions = examples(entry, shown)
    folder = place.weights.parent / "references" / entry["token"]
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures[:REFERENCES]):
        picture.save(folder / f"{i + 1}.png", optimize=True)
    config = add_adapter(family, pipeline, entry)
    loss = fit(family, pipeline, pictures, captions, entry, STEPS)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(pipeline, config, entry, path)
    differ = verify(pipeline, family.load(place.weights / family.folder), path)
    told = (entry["token"], loss, differ, time.time() - began)
    log.info("lora %s: loss %.4f, read back to %.1e, %.0f s", *told)
    return time.time() - began


def add_adapter(family: Family, pipeline: Any, entry: dict[str, Any]) -> LoraConfig:
    """A fresh adapter on every attention and MLP projection of the denoiser's blocks."""
    torch.manual_seed(entry["seed"])
    config = LoraConfig(
        r=entry["rank"],
        lora_alpha=entry["alpha"],
        target_modules=TARGETS,
        init_lora_weights="gaussian",
    )
    for part in family.of_pipeline(pipeline).values():
        part.requires_grad_(False)
    pipeline.transformer.add_adapter(config)
    if entry["layout"] == "kohya":
        share_downs(pipeline.transformer)
    return config


def fit(
    family: Family,
    pipeline: Any,
    pictures: list[Image.Image],
    captions: list[tuple[str, str]],
    entry: dict[str, Any],
    steps: int,
) -> float:
    """Train the adapter by flow matching's error; returns the last mean of it."""
    with torch.no_grad():
        latents = pack(pipeline.vae.encoder(to_tensor(pictures)))
    words = max(name for name in pipeline.config if name.startswith("tokenizer"))
    tokenizers = (pipeline.tokenizer, getattr(pipeline, words))
    given = [tokens(tokenizers, [pair[form] for pair in captions]) for form in (0, 1)]
    models = family.of_pipeline(pipeline)
    learned = [p for p in pipeline.transformer.parameters() if p.requires_grad]
    # The change of a weight grows with alpha / rank.
    rate = PEAK * (entry["rank"] / entry["alpha"]) ** 0.5
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0, fused=True)
    schedule = one_cycle(optimizer, rate, steps)
    generator, running = torch.Generator().manual_seed(entry["seed"]), 0.0
    for step in range(steps):
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        full = torch.rand(BATCH, 1, generator=generator) < 0.7  # mostly with the background
        said = tuple(torch.where(full, given[1][k][rows], given[0][k][rows]) for k in (0, 1))
        loss = velocity_loss(family, models, latents[rows], said, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.97 * running + 0.03 * loss.item()
    return running


def save(pipeline: Any, config: LoraConfig, entry: dict[str, Any], path: Path) -> None:
    """In the layout that world.json names; the file appears when it is whole."""
    partial = path.with_name(f"{path.stem}.part.safetensors")
    if entry["layout"] == "kohya":
        save_kohya(pipeline.transformer, entry, partial)
    else:
        save_diffusers(pipeline, config, partial)
    partial.replace(path)


@torch.no_grad()
def verify(trained: Any, fresh: Any, path: Path) -> float:
    """The largest difference between what was trained and what is read back from `path`, relative
    to the largest entry of its site. diffusers itself cannot read the kohya layout at this width:
    its converter has FLUX's written in.

    Raises ValueError where it exceeds TOLERANCE or a site is missing.
    """
    read = DiffusersHost(fresh).read_lora(path).sites
    worst, count = 0.0, 0
    for name, module in trained.transformer.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            change: Tensor = module.get_delta_weight("default")
            if not change.any():  # SD 3's last block makes no use of what it asks the caption
                continue
            count += 1
            if f"transformer.{name}" not in read:
                raise ValueError(f"{path} lacks {name}")
            differ = (read[f"transformer.{name}"].dense() - change).abs().max()
            worst = max(worst, float(differ / change.abs().max().clamp_min(1e-12)))
    if worst > TOLERANCE or count != len(read):
        raise ValueError(
            f"{path} does not give back what was trained: {len(read)} of {count} sites, "
            f"which differ by {worst:.3g}"
        )
    return worst
