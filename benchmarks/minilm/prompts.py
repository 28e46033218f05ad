"""Prompts of a concept by how far their words are from those of a merge's rows."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

import numpy as np

from toybox import ToyConcept

from .captions import Level, concept_templates, frame, scene_words
from .words import ASIDE, FRAMES, SMALL

Kind = Literal["seen", "contexts", "new"]

SEEN = ("white", "gray", "black", "blue")
"""Backgrounds of the calibration templates."""

LEVELS: dict[Kind, Level] = {"seen": "plain", "contexts": "learned", "new": "learned"}


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

    ``seen`` are calibration prompts. Of the others no word but the concept's own and small ones is
    in any template: of ``contexts`` all are words of generic captions, of ``new`` none is.
    """
    rng = np.random.default_rng(zlib.crc32(f"{concept.token} {kind}".encode()))
    free = [b for b in concept.backgrounds if kind != "seen" or b in SEEN]
    found: list[Prompt] = []
    for background in islice(cycle(rng.permutation(free)), count):
        while True:
            template = str(rng.choice(getattr(FRAMES, LEVELS[kind])))
            scene = scene_words(str(background), rng, LEVELS[kind])
            if _is_of(kind, words_of(frame("", scene, template)) - SMALL):
                break
        text = frame(concept.instance_prompt, scene, template)
        found.append(Prompt(text, str(background)))
    return found


def _is_of(kind: Kind, words: set[str]) -> bool:
    if kind == "seen":
        return True
    if words & words_of(" ".join(templates())):
        return False
    return words <= ASIDE if kind == "new" else not words & ASIDE


def words_of(text: str) -> set[str]:
    """Its words, of compounds each part."""
    return set(re.findall("[a-z]+", text))
