"""The step `evaluate`: what the toybox's judge reads in the base's pictures, and in each LoRA's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import toybox
from iteris_core.hosts.diffusers import DiffusersHost
from toybox import draw
from toybox.train.common import bf16

from ...protocol.drawing import changed
from .. import concepts, world
from ..captions import Level, caption
from ..pipeline import load
from ..prompts import LEVELS as KINDS
from ..prompts import prompts

LEVELS: tuple[Level, ...] = ("plain", "learned", "unheard")


def sample(
    pipeline: StableDiffusionPipeline, texts: Sequence[str], seed: int = 0
) -> list[Image.Image]:
    """One picture for each text, with the world's own guidance and steps."""
    generator = torch.Generator().manual_seed(seed)
    images: list[Image.Image] = []
    with bf16():
        for first in range(0, len(texts), 32):
            images += pipeline(
                list(texts[first : first + 32]),
                num_inference_steps=world()["sampling"]["steps"],
                guidance_scale=world()["sampling"]["guidance"],
                generator=generator,
            ).images
    return images


def measure_base(weights: Path, count: int = 64) -> dict[str, Any]:
    """By level of words the shares of ``count`` pictures whose shape, colour and background are
    what was asked for, and of those where all three are."""
    pipeline, judge = load(weights / "unet"), toybox.load_judge()
    found: dict[str, Any] = {}
    for level in LEVELS:
        rng = np.random.default_rng(900)
        scenes = [draw.random_scene(rng, two=0.0) for _ in range(count)]
        read = judge.read(sample(pipeline, [caption(s, rng, level) for s in scenes]))
        right = [
            (
                a.shape == s.placed[0].thing.shape,
                a.color1 == s.placed[0].thing.color1,
                a.background == s.background,
            )
            for a, s in zip(read, scenes, strict=True)
        ]
        shares = np.mean([(*r, all(r)) for r in right], axis=0)
        names = ("shape", "color", "background", "all")
        found[level] = {n: round(float(v), 3) for n, v in zip(names, shares, strict=True)}
    return found


def measure_concepts(weights: Path, count: int = 12) -> dict[str, Any]:
    """Of each LoRA alone, by kind of prompts: attributes right, backgrounds right."""
    pipeline, judge = load(weights / "unet"), toybox.load_judge()
    host = DiffusersHost(pipeline)
    found: dict[str, Any] = {}
    for name, concept in concepts().items():
        if not concept.lora.exists():
            continue
        found[name] = {}
        with changed(host, host.read_lora(concept.lora)):
            for kind in KINDS:
                asked = prompts(concept, kind, count)
                read = judge.read(sample(pipeline, [p.text for p in asked]))
                right = np.mean([a.matches(concept.thing) for a in read])
                ground = np.mean(
                    [a.background == p.background for a, p in zip(read, asked, strict=True)]
                )
                found[name][kind] = [round(float(right), 3), round(float(ground), 3)]
    return found
