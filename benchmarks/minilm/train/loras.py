"""The step `loras`: six pictures of each concept in plain words, and a LoRA of rank 8 of them."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn import functional as F

from toybox import ToyConcept, draw
from toybox.train.base import velocity
from toybox.train.common import bf16, one_cycle, to_tensor

from .. import concepts, world
from ..captions import concept_templates
from ..pipeline import load

log = logging.getLogger(__name__)
RANK, BATCH, REFERENCES = 8, 8, 6
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": r".*attention\.(self\.(query|key|value)|output\.dense)",
}
PEAKS = {"unet": 2e-3, "text_encoder": 5e-4}


def train(weights: Path, only: Sequence[str] = ()) -> dict[str, int]:
    """Every concept (or ``only`` those) that has no file yet; the seconds that each took."""
    seconds: dict[str, int] = {}
    for number, concept in enumerate(concepts().values()):
        if not concept.lora.exists() and (not only or concept.token in only):
            seconds[concept.token] = train_one(concept, number, weights)
    return seconds


def train_one(concept: ToyConcept, number: int, weights: Path) -> int:
    """Minimise the v-prediction error on the concept's pictures, and save its LoRA."""
    began = time.time()
    torch.manual_seed(61 + number)
    pipeline = load(weights / "unet")
    pipeline.unet.set_attn_processor(AttnProcessor())
    parameters = add_adapters(pipeline)
    latents, tokens = references(pipeline, concept, 600 + 10 * number)
    groups = [{"params": parameters[name], "lr": PEAKS[name]} for name in TARGETS]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    steps = world()["concepts"][number]["steps"]
    schedule = one_cycle(optimizer, [PEAKS[name] for name in TARGETS], steps)
    alphas = pipeline.scheduler.alphas_cumprod
    generator, running = torch.Generator().manual_seed(61 + number), 0.0
    for step in range(steps):
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        said = torch.randint(tokens.shape[1], (BATCH,), generator=generator)
        t = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator)
        noised, target = velocity(alphas, latents[rows], noise, t)
        with bf16():
            context = pipeline.text_encoder(tokens[rows, said])[0]
            predicted = pipeline.unet(noised, t, context, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.97 * running + 0.03 * loss.item()
    save(pipeline, concept.lora)
    log.info("lora %s: loss %.4f, %.0f s", concept.token, running, time.time() - began)
    return round(time.time() - began)


def add_adapters(pipeline: StableDiffusionPipeline) -> dict[str, list[torch.nn.Parameter]]:
    """Fresh adapters on every attention projection of UNet and MiniLM, alpha as the rank."""
    found = {}
    for name, targets in TARGETS.items():
        model = getattr(pipeline, name)
        model.requires_grad_(False)
        model.add_adapter(
            LoraConfig(
                r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights="gaussian"
            )
        )
        found[name] = [p for p in model.parameters() if p.requires_grad]
    return found


@torch.no_grad()
def references(
    pipeline: StableDiffusionPipeline, concept: ToyConcept, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (6, 4, 8, 8) of the concept in other places, sizes and backgrounds, and the tokens
    (6, captions, 32) of what is said of each: plain words, with its background and, in three of
    ten, without."""
    rng = np.random.default_rng(seed)
    free = [concept.backgrounds[i % len(concept.backgrounds)] for i in range(REFERENCES)]
    scenes = [draw.place_one(concept.thing, background, rng) for background in free]
    latents = pipeline.vae.encoder(to_tensor(draw.draw(scene, rng) for scene in scenes))
    texts = []
    for background in free:
        said = [
            t.replace("a {}", concept.instance_prompt) for t in concept_templates([background])[:6]
        ]
        texts += [*said, *[concept.instance_prompt] * 2]
    tokens = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    return latents, tokens.unflatten(0, (REFERENCES, -1))


def save(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """In peft's names behind those of the components, float16; alpha is the rank."""
    tensors: dict[str, torch.Tensor] = {}
    for name in TARGETS:
        state = get_peft_model_state_dict(getattr(pipeline, name), save_embedding_layers=False)
        for key, value in state.items():
            key = re.sub(r"^base_model\.model\.", "", key)
            tensors[f"{name}.{key}"] = value.detach().half().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"targets": json.dumps(TARGETS)})
