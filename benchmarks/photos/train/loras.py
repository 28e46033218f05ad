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
from PIL import Image
from safetensors.torch import save_file

from toybox.draw import BACKGROUNDS
from toybox.train.lora_files import adapter_layers
from toybox.train.loras import fit

from .. import Subject, load_pipeline, subjects
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
        for number, subject in enumerate(subjects(training, weights).values()):
            if not subject.lora.exists():
                train_one(subject, number, training, cuts[subject.file], weights)
                count += 1
    return {"loras_seconds": round(time.time() - began), "loras": count} if count else {}


def train_one(subject: Subject, number: int, training: int, cut, weights: Path) -> None:
    """Minimise the v-prediction error on the thing's pictures, and save its LoRA."""
    began, seed = time.time(), 1000 * training + number
    torch.manual_seed(seed)
    rank = RANKS[number % len(RANKS)]
    pipeline = load_pipeline(weights)
    pipeline.unet.set_attn_processor(AttnProcessor())
    parameters: dict[str, list[torch.nn.Parameter]] = {}
    pipeline.text_encoder.requires_grad_(False)
    names = ["unet"] if number % READING else [*TARGETS]
    for name in names:
        model = getattr(pipeline, name)
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS[name]))
        parameters[name] = [p for p in model.parameters() if p.requires_grad]
    pictures, prompts = examples(subject, cut, seed)
    groups = [{"params": parameters[name], "lr": PEAKS[name]} for name in names]

    def which(count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(len(prompts[0]), (count,), generator=generator)

    loss = fit(pipeline, pictures, prompts, groups, STEPS, seed, batch=BATCH, which=which)
    save(pipeline, names, subject.lora)
    size = median(
        float(module.get_delta_weight("default").norm() / module.base_layer.weight.norm())
        for name in names
        for module in getattr(pipeline, name).modules()
        if isinstance(module, LoraLayer)
    )
    seconds = time.time() - began
    log.info("%s: loss %.4f, %.3f of the weights, %.0f s", subject.lora, loss, size, seconds)


def examples(subject: Subject, cut, seed: int) -> tuple[list[Image.Image], list[list[str]]]:
    """Pictures of the thing, and six captions of each in plain words: four with its background, two
    without."""
    rng = np.random.default_rng(seed)
    grounds = [str(b) for b in rng.permutation(list(BACKGROUNDS))[:PICTURES]]
    pictures = [picture(cut, ground, rng) for ground in grounds]
    prompts: list[list[str]] = []
    for ground in grounds:
        framed = [t.replace("{}", subject.prompt) for t in templates([ground])]
        prompts.append(
            [*(str(t) for t in rng.permutation(framed)[:4]), *[f"a {subject.prompt}"] * 2]
        )
    return pictures, prompts


def save(pipeline: StableDiffusionPipeline, names: Sequence[str], path: Path) -> None:
    """In peft's names behind those of the components, float16; alpha is the rank."""
    tensors = {
        f"{name}.{key.removeprefix('base_model.model.')}": value
        for name in names
        for key, value in adapter_layers(getattr(pipeline, name)).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        tensors, path, metadata={"targets": json.dumps({name: TARGETS[name] for name in names})}
    )
