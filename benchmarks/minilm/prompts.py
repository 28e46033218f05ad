"""Prompts of a concept in words of a level, and captions that name none."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np

from toybox import draw

from . import Concept
from .captions import Level, caption, concept_templates, frame, scene_words
from .words import FRAMES

SEEN = ("white", "gray", "black", "blue")
"""Backgrounds of the calibration templates."""

_SMALL = {"a", "an", "of", "on"}


@dataclass(frozen=True)
class Prompt:
    """What is asked for, and the background that it means."""

    text: str
    background: str


def templates() -> list[str]:
    """Those of calibration: plain frames on plain surfaces of the backgrounds `SEEN`."""
    return concept_templates(SEEN)


def prompts(concept: Concept, level: Level, count: int) -> list[Prompt]:
    """``count`` of them, always the same; ``plain`` are calibration prompts. Of the other levels no
    word but the concept's own and a, an, of, on is in any template."""
    rng = np.random.default_rng(zlib.crc32(f"{concept.token} {level}".encode()))
    free = [b for b in concept.backgrounds if level != "plain" or b in SEEN]
    of_templates = words_of(" ".join(templates())) - _SMALL
    found: list[Prompt] = []
    for background in islice(cycle(rng.permutation(free)), count):
        while True:
            template = str(rng.choice(getattr(FRAMES, level)))
            scene = scene_words(str(background), rng, level)
            said = frame(f"a {concept.phrase}", scene, template)
            new = not words_of(frame("", scene, template)) & of_templates
            if new or level == "plain":
                break
        found.append(Prompt(said, str(background)))
    return found


def generic(count: int, seed: int = 5) -> list[str]:
    """Captions of the base's own, plain and learned words, of any thing but of no concept."""
    rng = np.random.default_rng(seed)
    scenes = [draw.random_scene(rng, 0.25, two=0.0) for _ in range(count)]
    return [caption(scene, rng) for scene in scenes]


def words_of(text: str) -> set[str]:
    """Its words, of compounds each part."""
    return set(re.findall("[a-z]+", text))
