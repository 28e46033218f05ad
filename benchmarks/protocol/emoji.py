"""The world of emoji as a world of the protocol: things that its base does not know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import emoji
import numpy as np
import torch
from emoji.features import Features
from emoji.words import BACKGROUNDS, article, world
from PIL import Image

from iteris_core import Concept, Lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.score import ClipScorer, without_tokens

from .drawing import draw, scenes_of
from .world import FIGURES, KINDS, Wanted

REPORTED = 10
"""The last ten subjects are reported, as many as SSR-Merge's paper has."""

SEEN, NEW = tuple(BACKGROUNDS)[:4], tuple(BACKGROUNDS)[4:]
"""Backgrounds that rows may have, and those of evaluation prompts."""

PLAINLY = ("a {}", "{}", "a picture of a {}")
FRAMED = (*PLAINLY, *(f"a {{}} on a {background} background" for background in SEEN))
"""Templates of calibration, without and with the frame of evaluation prompts."""

SPREAD, PLAIN = 4, 8
"""Seeds of one prompt, and prompts without a trigger."""

_NEAR = 40.0
"""How far, in levels of 255, a picture's edge may lie from a background's own colour."""


class EmojiWorld:
    kinds = KINDS
    trained = 1

    def __init__(self) -> None:
        self.pipeline = emoji.load_pipeline()
        self.host = DiffusersHost(self.pipeline)
        self._subjects = emoji.subjects()
        self.subjects = tuple(self._subjects)[-REPORTED:]
        self.half: dict[str, Any] = {"templates": FRAMED}
        self.words = frozenset(NEW)
        self._features, self._clip = Features(), ClipScorer(*emoji.load_clip())
        self._references: dict[str, torch.Tensor] = {}
        self._loras: dict[str, Lora] = {}

    def concepts(self, names: Sequence[str], trained: int) -> list[Concept]:
        return [self._concept(name) for name in names]

    def _concept(self, name: str) -> Concept:
        of = self._subjects[name]
        if name not in self._loras:
            self._loras[name] = self.host.read_lora(of.lora)
        return Concept(self._loras[name], None, name, of.kind)

    def prompted(self, kind: str, names: Sequence[str], seed: int) -> list[Wanted]:
        if kind == "no trigger":
            things = np.random.default_rng(seed).permutation(list(world()["names"]))
            return [
                Wanted((), f"{article(str(thing))} on a {b} background", seed, b)
                for thing, b in zip(things[:PLAIN], cycle(BACKGROUNDS), strict=False)
            ]
        wanted: list[Wanted] = []
        for name in names:
            phrase = self._subjects[name].prompt
            texts = [(template.replace("{}", phrase), "") for template in PLAINLY]
            if kind != "seen":
                texts = [(f"a {phrase} on a {b} background", b) for b in NEW]
            for prompt, b in texts[: 1 if kind == "spread" else None]:
                seeds = range(100 * seed, 100 * seed + (SPREAD if kind == "spread" else 1))
                wanted += [Wanted((name,), prompt, one, b) for one in seeds]
        return wanted

    def draw(self, lora: Lora | None, wanted: Sequence[Wanted]) -> list[Image.Image]:
        return draw(self.pipeline, self.host, lora, wanted)

    def read(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> list[Mapping[str, float]]:
        """``judge``: 1 where the picture is more like the subject's references than like any other
        subject's, by the features that saw none of these pictures."""
        scenes = scenes_of(images, wanted, BACKGROUNDS, _NEAR)
        if not wanted[0].shown:
            return [{"scene": scene} for scene in scenes]
        names = [w.shown[0] for w in wanted]
        vectors = self._features.embed_images(images)
        likeness = [self._to(name, v) for name, v in zip(names, vectors, strict=True)]
        judged = [float(self._likest(v) == n) for v, n in zip(vectors, names, strict=True)]
        plain = [without_tokens(w.prompt, list(self._subjects)) for w in wanted]
        texts = self._clip.text_alignment(images, plain).tolist()
        columns = (likeness, judged, texts, scenes)
        return [dict(zip(FIGURES, one, strict=True)) for one in zip(*columns, strict=True)]

    def pictures_of(self, name: str) -> list[Image.Image]:
        files = sorted((emoji.ROOT / "references" / name).glob("*.png"))
        return [Image.open(file).convert("RGB") for file in files]

    def embedded(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return self._clip.embed_images(images)

    def _to(self, name: str, vector: torch.Tensor) -> float:
        """The mean likeness to the references of ``name``."""
        if name not in self._references:
            self._references[name] = self._features.embed_images(self.pictures_of(name))
        return float((self._references[name] @ vector).mean())

    def _likest(self, vector: torch.Tensor) -> str:
        return max(self._subjects, key=lambda name: self._to(name, vector))
