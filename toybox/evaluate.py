"""Measures the toybox's quality: the judge reads images of the base and of each concept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from . import ToyConcept, settings
from .draw import BACKGROUNDS, compose, describe, random_thing
from .judge import Judge


def sample(pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> list[Image.Image]:
    """One picture for each prompt, with the world's own guidance and steps."""
    values = settings()
    generator = torch.Generator().manual_seed(0)
    images: list[Image.Image] = []
    for first in range(0, len(prompts), 32):
        images += pipeline(
            list(prompts[first : first + 32]),
            num_inference_steps=values["steps"],
            guidance_scale=values["guidance"],
            generator=generator,
        ).images
    return images


def measure_base(
    pipeline: StableDiffusionPipeline, judge: Judge, count: int = 128
) -> dict[str, float]:
    """Shares of `count` one-object and `count` two-object images that match their prompt."""
    rng = np.random.default_rng(700)
    backgrounds = list(BACKGROUNDS)
    ones, twos = [], []
    for i in range(count):
        background = backgrounds[i % len(backgrounds)]
        ones.append((background, random_thing(rng, background)))
        left, right = (random_thing(rng, background) for _ in range(2))
        while right.shape == left.shape:
            right = random_thing(rng, background)
        twos.append((background, left, right))
    images = sample(pipeline, [compose((describe(t),), b) for b, t in ones])
    single = [
        (a.shape == t.shape, a.color1 == t.color1, a.background == b, a.pattern == "plain")
        for a, (b, t) in zip(judge.read(images), ones, strict=True)
    ]
    images = sample(pipeline, [compose((describe(x), describe(y)), b) for b, x, y in twos])
    pairs = [
        ((a.shape == x.shape, b.shape == y.shape), (a.color1 == x.color1, b.color1 == y.color1))
        for (a, b), (_, x, y) in zip(judge.read_halves(images), twos, strict=True)
    ]
    shape, color, background, plain = np.mean(single, axis=0)
    return {
        "one_shape": float(shape),
        "one_color": float(color),
        "one_background": float(background),
        "one_plain": float(plain),
        "one_shape_color_background": float(np.mean([all(s[:3]) for s in single])),
        "two_both_shapes": float(np.mean([all(p[0]) for p in pairs])),
        "two_both_colors": float(np.mean([all(p[1]) for p in pairs])),
        "two_all": float(np.mean([all(p[0]) and all(p[1]) for p in pairs])),
    }


def load_concept(pipeline: StableDiffusionPipeline, concept: ToyConcept) -> None:
    """Load the concept's own files into `pipeline`."""
    if concept.embedding is not None:
        pipeline.load_textual_inversion(str(concept.embedding), token=concept.token)
    pipeline.load_lora_weights(str(concept.lora.parent), weight_name=concept.lora.name)


def concept_prompts(concept: ToyConcept, count: int) -> list[str]:
    """'a sks1 star on a ... background' over the backgrounds that suit the concept."""
    free, name = concept.backgrounds, f"{concept.token} {concept.class_word}"
    return [compose((name,), free[i % len(free)]) for i in range(count)]


def measure_concept(
    pipeline: StableDiffusionPipeline,
    judge: Judge,
    concept: ToyConcept,
    count: int = 30,
) -> dict[str, float]:
    """Shares of the four attributes and of the background, in `count` pictures with the LoRA."""
    images = sample(pipeline, concept_prompts(concept, count))
    read = judge.read(images)
    right = np.array([a.matches(concept.thing) for a in read])
    free = concept.backgrounds
    background = np.mean([a.background == free[i % len(free)] for i, a in enumerate(read)])
    shape, pattern, color1, color2 = right.mean(axis=0)
    return {
        "attributes": float(right.mean()),
        "all_four": float(right.all(axis=1).mean()),
        "shape": float(shape),
        "pattern": float(pattern),
        "color1": float(color1),
        "color2": float(color2),
        "background": float(background),
    }


def sheet(images: Sequence[Image.Image], path: Path, columns: int = 10) -> None:
    """The images side by side at twice the size, for viewing."""
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * 66, rows * 66), (90, 0, 90))
    for i, image in enumerate(images):
        canvas.paste(image, (i % columns * 66, i // columns * 66))
    canvas.resize((canvas.width * 2, canvas.height * 2), Image.Resampling.NEAREST).save(path)
