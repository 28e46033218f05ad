"""The step ``loras``: three trainings of a LoRA for each thing that is held out.

A thing has six pictures on the backgrounds in turn, behind a rare word and its kind, "sks bird". A
training differs from the others in its pictures, its noise and its start. Ranks are 4 to 32, and
two LoRAs of three leave the text encoder as it is. Rates are low for the number of steps, so that
changes are as large against the weights as those of people's LoRAs.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from minilm.prompts import templates
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn import functional as F

from toybox.draw import BACKGROUNDS
from toybox.train.base import velocity
from toybox.train.common import bf16, one_cycle, to_tensor

from .. import Subject, subjects
from ..pipeline import load
from ..things import cutouts, picture

log = logging.getLogger(__name__)
TRAININGS, STEPS, BATCH, PICTURES = 3, 200, 6, 6
RANKS = (4, 8, 4, 16, 4, 8, 4, 32)
READING = 3
"""One LoRA of as many changes the text encoder too."""
TARGETS = {
    "unet": r".*(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)",
    "text_encoder": r".*attention\.(self\.(query|key|value)|output\.dense)",
}
PEAKS = {"unet": 2e-3, "text_encoder": 4e-4}


def train(work: Path, weights: Path) -> dict[str, int]:
    """Every LoRA that has no file yet."""
    cuts, began, count = cutouts(work / "package"), time.time(), 0
    for training in range(TRAININGS):
        for number, subject in enumerate(subjects(training).values()):
            if not subject.lora.exists():
                train_one(subject, number, training, cuts[subject.file], weights)
                count += 1
    return {"loras_seconds": round(time.time() - began), "loras": count} if count else {}


def train_one(subject: Subject, number: int, training: int, cut, weights: Path) -> None:
    """Minimise the v-prediction error on the thing's pictures, and save its LoRA."""
    began, seed = time.time(), 1000 * training + number
    torch.manual_seed(seed)
    rank = RANKS[number % len(RANKS)]
    pipeline = load(weights)
    pipeline.unet.set_attn_processor(AttnProcessor())
    parameters: dict[str, list[torch.nn.Parameter]] = {}
    pipeline.text_encoder.requires_grad_(False)
    names = ["unet"] if number % READING else [*TARGETS]
    for name in names:
        model = getattr(pipeline, name)
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS[name]))
        parameters[name] = [p for p in model.parameters() if p.requires_grad]
    latents, tokens = examples(pipeline, subject, cut, seed)
    groups = [{"params": parameters[name], "lr": PEAKS[name]} for name in names]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    schedule = one_cycle(optimizer, [PEAKS[name] for name in names], STEPS)
    alphas, running = pipeline.scheduler.alphas_cumprod, 0.0
    g = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        rows = torch.randint(len(latents), (BATCH,), generator=g)
        caption = torch.randint(tokens.shape[1], (BATCH,), generator=g)
        t = torch.randint(1000, (BATCH,), generator=g)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=g)
        noised, target = velocity(alphas, latents[rows], noise, t)
        with bf16():
            context = pipeline.text_encoder(tokens[rows, caption])[0]
            predicted = pipeline.unet(noised, t, context, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.97 * running + 0.03 * loss.item()
    save(pipeline, names, subject.lora)
    size = median(
        float(module.get_delta_weight("default").norm() / module.base_layer.weight.norm())
        for name in names
        for module in getattr(pipeline, name).modules()
        if isinstance(module, LoraLayer)
    )
    seconds = time.time() - began
    log.info("%s: loss %.4f, %.3f of the weights, %.0f s", subject.lora, running, size, seconds)


@torch.no_grad()
def examples(
    pipeline: StableDiffusionPipeline, subject: Subject, cut, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (6, 4, 16, 16) of pictures of the thing, and the tokens (6, captions, 32) of what is
    said of each: plain words, with its background and, in a third, without."""
    rng = np.random.default_rng(seed)
    grounds = [str(b) for b in rng.permutation(list(BACKGROUNDS))[:PICTURES]]
    latents = pipeline.vae.encoder(to_tensor(picture(cut, ground, rng) for ground in grounds))
    texts: list[str] = []
    for ground in grounds:
        framed = [t.replace("{}", subject.prompt) for t in templates([ground])]
        texts += [*(str(t) for t in rng.permutation(framed)[:4]), *[f"a {subject.prompt}"] * 2]
    tokens = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    return latents, tokens.unflatten(0, (PICTURES, -1))


def save(pipeline: StableDiffusionPipeline, names: Sequence[str], path: Path) -> None:
    """In peft's names behind those of the components, float16; alpha is the rank."""
    tensors = {
        f"{name}.{key.removeprefix('base_model.model.')}": value.detach().half().contiguous()
        for name in names
        for key, value in get_peft_model_state_dict(
            getattr(pipeline, name), save_embedding_layers=False
        ).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        tensors, path, metadata={"targets": json.dumps({name: TARGETS[name] for name in names})}
    )
