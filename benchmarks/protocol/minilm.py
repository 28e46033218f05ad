"""The world whose text encoder is a pretrained one, as a world of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import minilm
import numpy as np
import torch
from minilm.prompts import ASIDE, caption, prompts, templates
from PIL import Image

import toybox
from iteris_core import Lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.score import ClipScorer
from toybox.draw import BACKGROUNDS, draw, place_one, random_thing

from .drawing import draw as draw_pictures
from .toybox import ToyboxWorld, trainings
from .world import Wanted

REFERENCES, SEEN, NEW, SPREAD, PLAIN = 6, 6, 12, 4, 12
"""Pictures of a concept that likeness is to, prompts of each kind, seeds of one prompt, and prompts
without a trigger."""


class MiniLMWorld(ToyboxWorld):
    """``new words`` are of words that the base learned and no row has (``minilm/words.json``)."""

    def __init__(self) -> None:
        self.pipeline = minilm.load_pipeline()
        self.host = DiffusersHost(self.pipeline)
        self.known = minilm.concepts()
        self.subjects = tuple(self.known)
        self.trained = trainings(minilm.ROOT, self.subjects)
        self._root = minilm.ROOT
        self.half = {"templates": templates()}
        self.words = ASIDE
        given = minilm.world()["sampling"]
        self.sampling = {"num_inference_steps": given["steps"], "guidance_scale": given["guidance"]}
        self.judge = toybox.load_judge()
        self._scorer = ClipScorer(*toybox.load_clip())
        self._references = {
            name: self._scorer.embed_images(self.pictures_of(name)) for name in self.known
        }
        self._loras = {}

    def prompted(self, kind: str, names: Sequence[str], seed: int) -> list[Wanted]:
        if kind == "no trigger":
            rng = np.random.default_rng(seed)
            grounds = islice(cycle(BACKGROUNDS), PLAIN)
            scenes = [place_one(random_thing(rng, b), b, rng) for b in grounds]
            return [Wanted((), caption(s, rng), seed, s.background) for s in scenes]
        return captioned([self.known[name] for name in names], kind, seed, NEW)

    def pictures_of(self, name: str) -> list[Image.Image]:
        concept, rng = self.known[name], np.random.default_rng(self.subjects.index(name))
        grounds = islice(cycle(concept.backgrounds), REFERENCES)
        return [draw(place_one(concept.thing, ground, rng), rng) for ground in grounds]

    def draw(self, lora: Lora | None, wanted: Sequence[Wanted]) -> list[Image.Image]:
        with torch.autocast("cpu", torch.bfloat16):
            return draw_pictures(self.pipeline, self.host, lora, wanted, **self.sampling)


def captioned(known: Sequence[Any], kind: str, seed: int, new: int) -> list[Wanted]:
    """Of each concept :data:`SEEN` calibration prompts, ``new`` ones on new words, or
    :data:`SPREAD` seeds of one of these."""
    count, seeds = {"seen": (SEEN, 1), "new words": (new, 1), "spread": (1, SPREAD)}[kind]
    return [
        Wanted((concept.token,), prompt.text, 100 * seed + number, prompt.background)
        for concept in known
        for prompt in prompts(concept, "seen" if kind == "seen" else "new", count)
        for number in range(seeds)
    ]
