"""The toybox, loaded once: what is merged, drawn and scored in the quality benchmarks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Protocol

import torch
from PIL import Image

import toybox
from iteris_core import Concept, Lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.score import ClipScorer, without_tokens
from toybox.demo import TEMPLATES

SEEDS = (1, 2, 3)
COLUMNS = ("image", "text", "judge", "pair")


@dataclass(frozen=True)
class Picture:
    concepts: tuple[str, ...]
    prompt: str
    seed: int


class Drawn(Protocol):
    """What drawing needs to know of a picture."""

    @property
    def prompt(self) -> str: ...
    @property
    def seed(self) -> int: ...


class World:
    """The toybox, loaded once: draws and scores. ``root`` is a folder with other concepts."""

    def __init__(self, root: Path = toybox.ROOT) -> None:
        self.pipeline = toybox.load_pipeline()
        self.host = DiffusersHost(self.pipeline)
        self.concepts = toybox.concepts(root)
        self.loras = {t: self.host.read_lora(c.lora) for t, c in self.concepts.items()}
        self.judge = toybox.load_judge()
        self.scorer = ClipScorer(*toybox.load_clip())
        self.settings = toybox.settings()
        self.references = {
            token: self.scorer.embed_images([Image.open(f).convert("RGB") for f in c.references])
            for token, c in self.concepts.items()
        }

    def merged_concepts(
        self, numbers: Sequence[int], weights: Sequence[float] | None, preserve: float
    ) -> list[Concept]:
        merged: list[Concept] = []
        for number, weight in zip(numbers, weights or [1.0] * len(numbers), strict=True):
            token = f"sks{number}"
            word = self.concepts[token].class_word
            merged.append(Concept(self.loras[token], None, token, word, weight=weight))
        if preserve:
            words = {concept.class_word for concept in merged}
            prompts = [template.format(word) for word in sorted(words) for template in TEMPLATES]
            merged.append(Concept(None, prompts, weight=preserve))
        return merged

    def pictures(self, numbers: Sequence[int]) -> list[Picture]:
        """Each concept on four backgrounds, and each two neighbours in one picture."""
        wanted: list[tuple[tuple[str, ...], str]] = []
        tokens = [f"sks{number}" for number in numbers]
        for token in tokens:
            concept = self.concepts[token]
            for background in concept.backgrounds[:4]:
                prompt = f"a {token} {concept.class_word} on a {background} background"
                wanted.append(((token,), prompt))
        for left, right in itertools.pairwise(tokens):
            one, two = self.concepts[left], self.concepts[right]
            background = next(b for b in one.backgrounds if b in two.backgrounds)
            prompt = (
                f"a {left} {one.class_word} left of a {right} {two.class_word} "
                f"on a {background} background"
            )
            wanted.append(((left, right), prompt))
        return [Picture(shown, prompt, seed) for shown, prompt in wanted for seed in SEEDS]

    def draw(self, lora: Lora | None, pictures: Sequence[Drawn]) -> list[Image.Image]:
        with self.changed(lora):
            images: list[Image.Image] = []
            for start in range(0, len(pictures), 32):
                some = pictures[start : start + 32]
                # The noise depends on the prompt too, so that no two prompts share a picture.
                generators = [
                    torch.Generator().manual_seed(
                        int(hashlib.sha256(f"{p.prompt}{p.seed}".encode()).hexdigest()[:8], 16)
                    )
                    for p in some
                ]
                images += self.pipeline(
                    [p.prompt for p in some],
                    num_inference_steps=self.settings["steps"],
                    guidance_scale=self.settings["guidance"],
                    generator=generators,
                ).images
            return images

    @contextmanager
    def changed(self, lora: Lora | None) -> Generator[None]:
        """The LoRA's changes added to the weights, which are put back bit for bit."""
        sites = self.host.sites()
        kept = {s: sites[s].weight.data.clone() for s in (lora.sites if lora else {})}
        try:
            for site, change in (lora.sites if lora else {}).items():
                weight = sites[site].weight.data
                weight += change.dense().reshape(weight.shape)
            yield
        finally:
            for site, weight in kept.items():
                sites[site].weight.data.copy_(weight)

    def score(
        self, pictures: Sequence[Picture], images: Sequence[Image.Image]
    ) -> dict[str, dict[str, float]]:
        """column → seed → mean"""
        values: dict[str, list[tuple[int, float]]] = {column: [] for column in COLUMNS}
        vectors = self.scorer.embed_images(images)
        texts = self.scorer.embed_texts(
            [without_tokens(p.prompt, list(self.concepts)) for p in pictures]
        )
        alone = self.judge.read(images)
        halves = self.judge.read_halves(images)
        for p, vector, text, whole, two in zip(
            pictures, vectors, texts, alone, halves, strict=True
        ):
            things = [self.concepts[token].thing for token in p.concepts]
            values["text"].append((p.seed, float(vector @ text)))
            if len(things) == 1:
                image = float((self.references[p.concepts[0]] @ vector).mean())
                values["image"].append((p.seed, image))
                values["judge"].append((p.seed, sum(whole.matches(things[0])) / 4))
            else:
                right = sum(sum(h.matches(t)) for h, t in zip(two, things, strict=True)) / 8
                values["pair"].append((p.seed, right))
        return {
            column: {str(seed): fmean(v for s, v in some if s == seed) for seed in SEEDS if some}
            for column, some in values.items()
            if some
        }
