"""How a merged LoRA may be used: other strengths, beside others, other samplers, bases, pipelines.

A :class:`Use` says what is loaded in place of a LoRA and how its pictures are drawn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from outputs import BUILD
from PIL import Image, ImageEnhance
from protocol.drawing import draw
from protocol.toybox import ToyboxWorld
from protocol.world import Wanted
from safetensors.torch import load_file, save_file
from torch import Tensor

import toybox
from iteris_core import Lora, LowRank
from iteris_core.lora import concatenate
from toybox import draw as drawn
from toybox.train.base import use_plain_attention
from toybox.train.loras import fit

WEIGHT = 1.3
"""Of a trigger and its class word, as in the prompt "a (sks cat:1.3) on a blue background"."""

LONG = ", a picture of one thing, in the middle of the picture, a plain thing on a plain background"
"""The toybox's base knows no prompt as long: it draws a third of the backgrounds of these."""


@dataclass(frozen=True)
class Beside:
    """What may be loaded beside: a ``concept`` that no prompt names, a ``style``."""

    concept: Lora
    style: Lora


def loaded(lora: Lora, text: float = 1.0, rest: float = 1.0) -> Lora:
    """At a strength in the text encoders, and at another one elsewhere."""
    of_text = {site: site.startswith("text_encoder") for site in lora.sites}
    return Lora({s: c.scaled(text if of_text[s] else rest) for s, c in lora.sites.items()})


def both(lora: Lora, other: Lora, strength: float) -> Lora:
    sites = dict(lora.sites)
    for site, change in loaded(other, strength, strength).sites.items():
        sites[site] = concatenate([sites[site], change]) if site in sites else change
    return Lora(sites)


def cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight.to(dtype).float()


def int8_rows(weight: Tensor) -> Tensor:
    """(out, in) in 255 steps, symmetric, with one scale for each row."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round() * scale


Pictures = Callable[[ToyboxWorld, Lora, Sequence[Wanted], Mapping[str, Any]], list[Image.Image]]


def _plain(
    world: ToyboxWorld, lora: Lora, wanted: Sequence[Wanted], options: Mapping[str, Any]
) -> list[Image.Image]:
    return draw(world.pipeline, world.host, lora, wanted, **options)


def _weighted(
    world: ToyboxWorld, lora: Lora, wanted: Sequence[Wanted], options: Mapping[str, Any]
) -> list[Image.Image]:
    """Embeddings of trigger and class word by :data:`WEIGHT`, from those of an empty prompt."""
    pipeline = world.pipeline
    names = {one.prompt: one.shown[0] for one in wanted}
    phrases = {p: f"{name} {world.known[name].class_word}" for p, name in names.items()}

    def weighted(prompts: Sequence[str], **more: Any) -> Any:
        embeds, negative = pipeline.encode_prompt(list(prompts), "cpu", 1, True)
        for row, prompt in enumerate(prompts):
            before, _, _ = prompt.partition(phrases[prompt])
            start = 1 + len(pipeline.tokenizer.tokenize(before))
            span = slice(start, start + len(pipeline.tokenizer.tokenize(phrases[prompt])))
            embeds[row, span] = torch.lerp(negative[row, span], embeds[row, span], WEIGHT)
        return pipeline(prompt_embeds=embeds, negative_prompt_embeds=negative, **more)

    return draw(weighted, world.host, lora, wanted, **options)


def _img2img(
    world: ToyboxWorld, lora: Lora, wanted: Sequence[Wanted], options: Mapping[str, Any]
) -> list[Image.Image]:
    """At .4 from the base's pictures of the class words."""
    triggers = re.compile(rf"\b({'|'.join(world.subjects)}) ")
    plain = [replace(one, prompt=triggers.sub("", one.prompt)) for one in wanted]
    starts = iter(draw(world.pipeline, world.host, None, plain, **options))
    pipeline = StableDiffusionImg2ImgPipeline(
        **world.pipeline.components, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)

    def changed(prompts: Sequence[str], **more: Any) -> Any:
        images = [next(starts) for _ in prompts]
        return pipeline(prompts, image=images, strength=0.4, **more)

    return draw(changed, world.host, lora, wanted, **options)


@cache
def fine_tuned() -> dict[str, Tensor]:
    """The toybox's denoiser after 300 steps at 2e-4 of all its weights on 200 muted pictures of
    plain things, kept in ``build/fine_tuned.safetensors``."""
    path = BUILD / "fine_tuned.safetensors"
    if not path.exists():
        rng = np.random.default_rng(31)
        scenes = [drawn.random_scene(rng, patterned=0.5, two=0.25) for _ in range(200)]
        pictures = [ImageEnhance.Color(drawn.draw(scene, rng)).enhance(0.7) for scene in scenes]
        prompts = [
            tuple(
                drawn.compose(tuple(drawn.describe(placed.thing) for placed in scene.placed), on)
                for on in (None, scene.background)
            )
            for scene in scenes
        ]
        torch.manual_seed(31)
        pipeline = toybox.load_pipeline()
        use_plain_attention(pipeline.unet, pipeline.text_encoder)
        pipeline.text_encoder.requires_grad_(False)
        groups = [{"params": list(pipeline.unet.parameters()), "lr": 2e-4}]
        fit(pipeline, pictures, prompts, groups, 300, 31)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: one.detach() for name, one in pipeline.unet.state_dict().items()}, path)
    return load_file(path)


def _on_fine_tuned(
    world: ToyboxWorld, lora: Lora, wanted: Sequence[Wanted], options: Mapping[str, Any]
) -> list[Image.Image]:
    unet = world.pipeline.unet
    kept = {name: one.clone() for name, one in unet.state_dict().items()}
    unet.load_state_dict(fine_tuned())
    try:
        return _plain(world, lora, wanted, options)
    finally:
        unet.load_state_dict(kept)


@dataclass(frozen=True)
class Use:
    """What is loaded in place of a LoRA; options of the pipeline; how all patched weights are
    rounded; the sampler, if it is not the world's own; how pictures are drawn; and the end of all
    prompts."""

    of: Callable[[Lora, Beside], Lora] = lambda lora, _: lora
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rounding: Callable[[Tensor], Tensor] | None = None
    sampler: Any = None
    pictures: Pictures = _plain
    ending: str = ""

    def draw(self, world: ToyboxWorld, lora: Lora, wanted: Sequence[Wanted]) -> list[Image.Image]:
        if self == Use(self.of):  # as the world draws anyway
            return world.draw(lora, wanted)
        if self.rounding is not None:
            lora = patched(world, lora, self.rounding)
        wanted = [replace(one, prompt=one.prompt + self.ending) for one in wanted]
        with sampled(world, self.sampler):
            return self.pictures(world, lora, wanted, {**world.sampling, **self.options})


CONDITIONS: Mapping[str, Use] = {
    "plain": Use(),
    "0.8": Use(lambda lora, _: loaded(lora, 0.8, 0.8)),
    "1.2": Use(lambda lora, _: loaded(lora, 1.2, 1.2)),
    "text 0.6": Use(lambda lora, _: loaded(lora, 0.6)),
    "another at 0.6": Use(lambda lora, more: both(lora, more.concept, 0.6)),
    "another at 1": Use(lambda lora, more: both(lora, more.concept, 1.0)),
}
FURTHER: Mapping[str, Use] = {
    "style at 0.6": Use(lambda lora, more: both(lora, more.style, 0.6)),
    "guidance 1.5": Use(options={"guidance_scale": 1.5}),
    "guidance 8": Use(options={"guidance_scale": 8.0}),
    "8 steps": Use(options={"num_inference_steps": 8}),
    "50 steps": Use(options={"num_inference_steps": 50}),
    "ancestral": Use(sampler=EulerAncestralDiscreteScheduler),
    "multistep": Use(sampler=DPMSolverMultistepScheduler),
    "weights": Use(pictures=_weighted),
    "long": Use(ending=LONG),
    "img2img": Use(pictures=_img2img),
    "fine-tuned": Use(pictures=_on_fine_tuned),
    "bfloat16": Use(rounding=cast(torch.bfloat16)),
    "float8": Use(rounding=cast(torch.float8_e4m3fn)),
    "int8": Use(rounding=int8_rows),
}


def patched(world: ToyboxWorld, lora: Lora, rounding: Callable[[Tensor], Tensor]) -> Lora:
    """A change that rounds every layer's patched weight."""
    sites: dict[str, LowRank] = {}
    for site, module in world.host.sites().items():
        weight: Tensor = module.weight.data.flatten(1)
        whole = weight.clone()
        if site in lora.sites:
            whole += lora.sites[site].dense().reshape(weight.shape)
        sites[site] = LowRank(rounding(whole) - weight, torch.eye(weight.shape[1]))
    return Lora(sites)


@contextmanager
def sampled(world: ToyboxWorld, sampler: Any) -> Generator[None]:
    kept = world.pipeline.scheduler
    if sampler is not None:
        world.pipeline.scheduler = sampler.from_config(kept.config)
    try:
        yield
    finally:
        world.pipeline.scheduler = kept
