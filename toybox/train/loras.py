"""The step `loras`: six reference pictures and one DreamBooth LoRA for each concept."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from torch.nn import functional as F

from .. import ROOT, draw
from ..pipeline import load
from .base import use_plain_attention, velocity
from .common import bf16, one_cycle, to_tensor
from .lora_files import note_words, save_diffusers, save_kohya, verify

log = logging.getLogger(__name__)
RANK, BATCH, PEAK, REFERENCES = 8, 8, 2e-3, 6
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}


def world(root: Path = ROOT) -> dict[str, Any]:
    """The content of world.json."""
    return json.loads((root / "world.json").read_text(encoding="utf-8"))


def reference_scenes(entry: dict[str, Any], seed: int) -> list[draw.Scene]:
    """Scenes of the concept in other places, sizes and backgrounds."""
    thing = draw.Thing(entry["class_word"], entry["color1"], entry["pattern"], entry["color2"])
    rng = np.random.default_rng(seed)
    free = [b for b in draw.BACKGROUNDS if b not in (thing.color1, thing.color2)]
    chosen = [free[i % len(free)] for i in rng.permutation(max(len(free), REFERENCES))]
    return [draw.place_one(thing, b, rng) for b in chosen[:REFERENCES]]


def write_references(entry: dict[str, Any], folder: Path, seed: int):
    """Draw the concept's pictures into `folder`; returns (scenes, pictures)."""
    rng = np.random.default_rng(seed + 1)
    scenes = reference_scenes(entry, seed)
    pictures = [draw.draw(scene, rng) for scene in scenes]
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i + 1}.png", optimize=True)
    return scenes, pictures


def add_adapters(pipeline: StableDiffusionPipeline, alpha: float) -> dict[str, LoraConfig]:
    """Fresh adapters on every attention projection of UNet and text encoder."""
    configs = {}
    for name, targets in TARGETS.items():
        configs[name] = LoraConfig(
            r=RANK, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian"
        )
        model = getattr(pipeline, name)
        model.requires_grad_(False)
        model.add_adapter(configs[name])
    return configs


def prompts_of(entry: dict[str, Any], scenes: list[draw.Scene]) -> list[tuple[str, str]]:
    """For each picture the DreamBooth prompt, and the same with the picture's background."""
    name = f"{entry['token']} {entry['class_word']}"
    return [(f"a {name}", draw.compose((name,), s.background)) for s in scenes]


def mostly_second(count: int, generator: torch.Generator) -> torch.Tensor:
    """Which prompt of two each row has: that with the background in 70 %."""
    return (torch.rand(count, generator=generator) < 0.7).long()


def fit(
    pipeline: StableDiffusionPipeline,
    pictures,
    prompts: Sequence[Sequence[str]],
    groups: list[dict],
    steps: int,
    seed: int,
    keep_rows=None,
    *,
    batch: int = BATCH,
    which: Callable[[int, torch.Generator], torch.Tensor] = mostly_second,
) -> float:
    """Minimise the v-prediction error over the parameters in `groups`; returns the mean of the last
    losses. Every picture has as many prompts as the others; `which` draws one for each row."""
    with torch.no_grad():
        latents = pipeline.vae.encoder(to_tensor(pictures))
    tokens = pipeline.tokenizer(
        [text for some in prompts for text in some], padding="max_length", return_tensors="pt"
    ).input_ids.unflatten(0, (len(prompts), -1))
    alphas = pipeline.scheduler.alphas_cumprod
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    scheduler = one_cycle(optimizer, [g["lr"] for g in groups], steps)
    generator, running = torch.Generator().manual_seed(seed), 0.0
    for step in range(steps):
        rows = torch.randint(len(latents), (batch,), generator=generator)
        form = which(batch, generator)
        t = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator)
        noised, target = velocity(alphas, latents[rows], noise, t)
        with bf16():
            context = pipeline.text_encoder(tokens[rows, form])[0]
            predicted = pipeline.unet(noised, t, context, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), target)
        loss.backward()
        if keep_rows is not None:
            keep_rows()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.97 * running + 0.03 * loss.item()
    return running


def adapter_parameters(pipeline: StableDiffusionPipeline) -> list[torch.nn.Parameter]:
    """The trainable parameters of UNet and text encoder."""
    return [
        p for m in (pipeline.unet, pipeline.text_encoder) for p in m.parameters() if p.requires_grad
    ]


def rate(alpha: float) -> float:
    """The learning rate for `alpha`: the change of a weight grows with alpha / rank."""
    return PEAK * (RANK / alpha) ** 0.5


def save(pipeline, configs, entry: dict[str, Any], path: Path) -> None:
    """Save in the layout that world.json names for the concept, with its words."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if entry["layout"] == "kohya":
        save_kohya(pipeline, RANK, entry["alpha"], path, entry["token"].strip("<>"))
    else:
        save_diffusers(pipeline, configs, path)
    note_words(path, entry)


def train_one(
    entry: dict[str, Any],
    index: int,
    weights: Path,
    references: Path,
    out: Path,
    again: int = 0,
) -> float:
    """Train one concept's LoRA into `out`, for the steps world.json says; returns seconds taken."""
    began = time.time()
    name = entry["token"].strip("<>")
    scenes, pictures = write_references(entry, references / name, 600 + 10 * index)
    seed = 61 + index + 1000 * again
    torch.manual_seed(seed)
    pipeline = load(weights / "base")
    use_plain_attention(pipeline.unet, pipeline.text_encoder)
    configs = add_adapters(pipeline, entry["alpha"])
    groups = [{"params": adapter_parameters(pipeline), "lr": rate(entry["alpha"])}]
    prompts = prompts_of(entry, scenes)
    loss = fit(pipeline, pictures, prompts, groups, entry["steps"], seed)
    save(pipeline, configs, entry, out)
    differ = verify(pipeline, load(weights / "base"), out, f"a {name} {entry['class_word']}")
    log.info(
        "lora %s: loss %.4f, reloaded to %.1e, %.0f s", name, loss, differ, time.time() - began
    )
    return time.time() - began


def train(
    work: Path,
    weights: Path,
    only: Sequence[str] = (),
    root: Path | None = None,
    again: int = 0,
) -> dict:
    """Train every concept (or `only` those named) that has no file yet.

    With `root`, train the concepts of its world.json, and write images and LoRAs there too; the
    base stays that of `weights`. `again` repeats training on the same images with other seeds, each
    into its own folder, `loras-1`, `loras-2` and so on.
    """
    said = world(root or ROOT)
    root = root or weights.parent
    folder = root / "weights" / (f"loras-{again}" if again else "loras")
    for index, entry in enumerate(said["concepts"]):
        token = entry["token"]
        path = folder / f"{token}.safetensors"
        if not path.exists() and (not only or token in only):
            number = said.get("first_number", 0) + index
            seconds = train_one(entry, number, weights, root / "references", path, again=again)
            note_seconds(work, f"{token}-{again}" if again else token, seconds)
    return {"lora_seconds": read_seconds(work)}


def note_seconds(work: Path, name: str, seconds: float) -> None:
    """Record a concept's training time, for quality.json."""
    times = {**read_seconds(work), name: round(seconds)}
    (work / "lora_seconds.json").write_text(json.dumps(times))


def read_seconds(work: Path) -> dict[str, int]:
    """The times that `note_seconds` recorded."""
    path = work / "lora_seconds.json"
    return json.loads(path.read_text()) if path.exists() else {}
