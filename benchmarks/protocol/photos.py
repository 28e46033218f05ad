"""The world of photographs as a world of the protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import photos
import torch
from emoji.features import Features
from minilm.prompts import ASIDE, said, templates
from photos.things import article, cutouts, references, world
from PIL import Image
from safetensors.torch import load_file

from iteris_core import Concept, Lora
from iteris_core.hosts.diffusers import DiffusersHost
from toybox.draw import BACKGROUNDS

from .drawing import draw, scenes_of
from .minilm import captioned
from .toybox import trainings
from .world import KINDS, Wanted

NEW, PLAIN = 8, 14
"""Prompts on new words, and without a trigger."""

_NEAR = 60.0
"""How far, in levels of 255, a picture's edge may lie from a background's own colour: grounds are
shaded and have grain."""


class PhotosWorld:
    """``new words`` are of words that the base learned and no row has (``minilm/words.json``).

    ``likeness`` and ``judge`` are of features that saw none of this world's pictures: to pictures
    of the thing that no LoRA learned from, and whether these are the likest of all the held-out
    things'.
    """

    kinds = (*KINDS, "quality")

    def __init__(self, weights: Path = photos.WEIGHTS) -> None:
        self.weights, self.pipeline = weights, photos.load_pipeline(weights)
        self.host = DiffusersHost(self.pipeline)
        self._subjects = photos.subjects()
        self.subjects = tuple(self._subjects)
        self.trained = trainings(weights.parent, self.subjects)
        self.half: dict[str, Any] = {"templates": templates()}
        self.words = ASIDE
        given = world()["sampling"]
        self._sampling = {
            "num_inference_steps": given["steps"],
            "guidance_scale": given["guidance"],
        }
        self._features = Features()
        known = load_file(photos.WEIGHTS / photos.REFERENCES)
        self._references = torch.stack([known[name].float().mean(0) for name in self.subjects])
        self._loras: dict[tuple[str, int], Lora] = {}

    def concepts(self, names: Sequence[str], trained: int) -> list[Concept]:
        return [
            Concept(self._lora(n, trained), None, n, self._subjects[n].class_word) for n in names
        ]

    def _lora(self, name: str, trained: int) -> Lora:
        if (name, trained) not in self._loras:
            path = photos.subjects(trained, self.weights)[name].lora
            self._loras[name, trained] = self.host.read_lora(path)
        return self._loras[name, trained]

    def prompted(self, kind: str, names: Sequence[str], seed: int) -> list[Wanted]:
        if kind == "no trigger":
            rng = np.random.default_rng(seed)
            things = rng.permutation([name for _, name, _ in world()["things"]])[:PLAIN]
            return [
                Wanted((), said(article(str(thing)), ground, rng), seed, ground)
                for thing, ground in zip(things, cycle(BACKGROUNDS), strict=False)
            ]
        return captioned([self._subjects[name] for name in names], kind, seed, NEW)

    def draw(self, lora: Lora | None, wanted: Sequence[Wanted]) -> list[Image.Image]:
        with torch.autocast("cpu", torch.bfloat16):
            return draw(self.pipeline, self.host, lora, wanted, **self._sampling)

    def read(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> list[Mapping[str, float]]:
        scenes = scenes_of(images, wanted, BACKGROUNDS, _NEAR)
        if not wanted[0].shown:
            return [{"scene": scene} for scene in scenes]
        likeness = self.embedded(images) @ self._references.T
        own = [self.subjects.index(w.shown[0]) for w in wanted]
        return [
            {"likeness": float(of[i]), "judge": float(int(of.argmax()) == i), "scene": scene}
            for of, i, scene in zip(likeness, own, scenes, strict=True)
        ]

    def pictures_of(self, name: str) -> list[Image.Image]:
        """Drawn from the package, which is not in this repository; SystemExit where it is not."""
        if not photos.PACKAGE.exists():
            raise SystemExit("Download the pictures: `python -m photos.train --step things`.")
        cut = cutouts(photos.PACKAGE)[self._subjects[name].file]
        return references(cut, self.subjects.index(name))

    def embedded(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return self._features.embed_images(list(images))
