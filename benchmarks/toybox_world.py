"""The toybox, loaded once: what is merged, drawn and scored in the quality benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from PIL import Image
from protocol.drawing import Drawn, changed, draw

import toybox
from iteris_core import Concept, Lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.score import ClipScorer, without_tokens
from toybox import TEMPLATES

SEEDS = (1, 2, 3)
COLUMNS = ("image", "text", "judge", "pair")


@dataclass(frozen=True)
class Picture:
    concepts: tuple[str, ...]
    prompt: str
    seed: int


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
        return draw(
            self.pipeline,
            self.host,
            lora,
            pictures,
            num_inference_steps=self.settings["steps"],
            guidance_scale=self.settings["guidance"],
        )

    def changed(self, lora: Lora | None) -> AbstractContextManager[None]:
        """The LoRA's changes added to the weights, which are put back bit for bit."""
        return changed(self.host, lora)

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
