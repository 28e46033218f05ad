"""Prompts of a concept by how far their words are from those of a merge's rows."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

import numpy as np
from protocol.held_out import words_of

from toybox import ToyConcept

from .captions import Level, concept_templates, frame, scene_words
from .words import ASIDE, FRAMES, SMALL

Kind = Literal["seen", "new"]

SEEN = ("white", "gray", "black", "blue")
"""Backgrounds of the calibration templates."""

LEVELS: dict[Kind, Level] = {"seen": "plain", "new": "learned"}


@dataclass(frozen=True)
class Prompt:
    """What is asked for, and the background that it means."""

    text: str
    background: str


def templates() -> list[str]:
    """Those of calibration: plain frames on plain surfaces of the backgrounds `SEEN`."""
    return concept_templates(SEEN)


def prompts(concept: ToyConcept, kind: Kind, count: int) -> list[Prompt]:
    """``count`` of them, always the same.

    ``seen`` are calibration prompts. Of ``new`` all words but the concept's own and small ones are
    of :data:`~.words.ASIDE`, which no row has.
    """
    rng = np.random.default_rng(zlib.crc32(f"{concept.token} {kind}".encode()))
    free = [b for b in concept.backgrounds if kind != "seen" or b in SEEN]
    found: list[Prompt] = []
    for background in islice(cycle(rng.permutation(free)), count):
        while True:
            template = str(rng.choice(getattr(FRAMES, LEVELS[kind])))
            scene = scene_words(str(background), rng, LEVELS[kind])
            if kind == "seen" or words_of(frame("", scene, template)) - SMALL <= ASIDE:
                break
        text = frame(concept.instance_prompt, scene, template)
        found.append(Prompt(text, str(background)))
    return found
