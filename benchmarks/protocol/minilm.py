"""The world of pictures that are asked for through MiniLM, as a world of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import minilm
import numpy as np
import torch
from minilm.prompts import Kind, prompts, templates
from PIL import Image

import toybox
from iteris_core import Concept, Lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.score import ClipScorer
from toybox import draw as pictures
from toybox.judge import halves

from .drawing import draw
from .world import Judged, Wanted

EACH = 4
"""Prompts of each concept with one seed, the next ones with the next."""

GENERIC = 150
_REFERENCES = 6


class MiniLmWorld:
    """Four concepts, one at a time in a picture. ``alone`` asks by calibration prompts, ``asked``
    by any."""

    sizes = (2, 4)
    styles: Sequence[str] = ()
    trained = 1
    calls = 2 * minilm.world()["sampling"]["steps"]
    collapse_below = (0.62,)
    """As of the toybox, whose pictures and CLIP these are."""

    def __init__(self) -> None:
        self.pipeline = minilm.load_pipeline()
        self.host = DiffusersHost(self.pipeline)
        self._concepts = minilm.concepts()
        self.subjects = tuple(self._concepts)
        self.calibration: dict[str, Any] = {"templates": templates()}
        self.judge = toybox.load_judge()
        self._scorer = ClipScorer(*toybox.load_clip())
        self._loras: dict[str, Lora] = {}
        self._references: dict[str, torch.Tensor] = {}

    def concepts(self, names: Sequence[str], trained: int = 0) -> list[Concept]:
        for name in names:
            if name not in self._loras:
                self._loras[name] = self.host.read_lora(self._concepts[name].lora)
        return [
            Concept(self._loras[n], trigger=n, class_word=self._concepts[n].class_word)
            for n in names
        ]

    def asked(self, name: str, kind: Kind, count: int, seed: int = 1) -> list[Wanted]:
        """``count`` pictures of one concept by prompts of a kind."""
        found = prompts(self._concepts[name], kind, count)
        return [Wanted((name,), p.text, seed, p.background) for p in found]

    def alone(self, name: str, seed: int) -> list[Wanted]:
        every = self.asked(name, "seen", 3 * EACH, seed)
        start = EACH * (seed % 3)
        return every[start : start + EACH]

    def together(self, names: Sequence[str], seed: int) -> list[Wanted]:
        """None: the base draws one thing."""
        return []

    def styled(self, subject: str, style: str, seed: int) -> list[Wanted]:
        return []

    def draw(self, lora: Lora | None, wanted: Sequence[Wanted]) -> list[Image.Image]:
        sampling = minilm.world()["sampling"]
        return draw(
            self.pipeline,
            self.host,
            lora,
            wanted,
            num_inference_steps=sampling["steps"],
            guidance_scale=sampling["guidance"],
        )

    def read(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> list[tuple[float, bool]]:
        """Of each picture the share of shape, pattern and both colours that is read rightly, and
        whether the background is what was asked for."""
        return [
            (
                sum(seen.matches(self._concepts[one.shown[0]].thing)) / 4,
                seen.background == one.scene,
            )
            for seen, one in zip(self.judge.read(images), wanted, strict=True)
        ]

    def likeness(self, images: Sequence[Image.Image], names: Sequence[str]) -> Judged:
        """``image`` by the toybox's CLIP; ``judge``, the share of shape, pattern and both colours
        that are read rightly."""
        vectors = self._scorer.embed_images(images)
        read = self.judge.read(images)
        return {
            "image": [float((self._of(n) @ v).mean()) for n, v in zip(names, vectors, strict=True)],
            "judge": [
                sum(r.matches(self._concepts[n].thing)) / 4
                for n, r in zip(names, read, strict=True)
            ],
        }

    def _of(self, name: str) -> torch.Tensor:
        """Embeddings of pictures of the concept, drawn by the toybox's program."""
        if name not in self._references:
            concept, rng = self._concepts[name], np.random.default_rng(7)
            drawn = [
                pictures.draw(pictures.place_one(concept.thing, ground, rng), rng)
                for ground in concept.backgrounds[:_REFERENCES]
            ]
            self._references[name] = self._scorer.embed_images(drawn)
        return self._references[name]

    def text_alignment(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> Sequence[float]:
        """To what is meant, in the words that the toybox's CLIP knows."""
        plain = [
            pictures.compose(
                (self._concepts[w.shown[0]].class_word,), getattr(w, "background", None)
            )
            for w in wanted
        ]
        return self._scorer.text_alignment(images, plain).tolist()

    def crops(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> list[tuple[Image.Image | None, ...]]:
        return [halves(image)[: len(w.shown)] for image, w in zip(images, wanted, strict=True)]
