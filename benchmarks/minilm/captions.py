"""Captions of scenes, and prompts of a concept, in words of a level."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from toybox.draw import Placed, Scene

from .words import (
    ADJECTIVES,
    COLORS,
    FRAMES,
    GROUNDS,
    PATTERNED,
    SCENES,
    SHAPES,
    SIZES,
    SURFACES,
    Words,
)

Level = Literal["plain", "learned"]

SMALL, LARGE = 16.0, 19.5
"""Radii under and over which a thing may be called small or large."""


def caption(scene: Scene, rng: np.random.Generator, level: Level | None = None) -> str:
    """Of a scene with one thing, in words of ``level``; None: as the base hears it, in plain and in
    learned ones."""
    said = _article(_thing(scene.placed[0], rng, level))
    if level is None and rng.random() < 0.05:
        return said
    return frame(said, scene_words(scene.background, rng, level), _one(FRAMES, rng, level))


def frame(thing: str, scene: str, template: str) -> str:
    """``template`` with both in their places."""
    return template.format(thing=thing, scene=scene)


def scene_words(background: str, rng: np.random.Generator, level: Level | None = None) -> str:
    """A place, or a surface of a colour: "on a lawn", "against an emerald curtain"."""
    places = SCENES[background]
    if _of(places, level) and rng.random() < 0.5:
        return _one(places, rng, level)
    surface = f"{_one(GROUNDS[background], rng, level)} {_one(SURFACES, rng, level)}"
    before = "against" if level is None and rng.random() < 0.3 else "on"
    return f"{before} {_article(surface)}"


def concept_templates(backgrounds: Sequence[str]) -> list[str]:
    """Every plain frame on every plain surface of ``backgrounds``, with "{}" for the concept."""
    scenes = [
        f"on a {adjective} {surface}"
        for background in backgrounds
        for adjective in GROUNDS[background].plain
        for surface in SURFACES.plain
    ]
    return [frame("a {}", scene, template) for scene in scenes for template in FRAMES.plain]


def _thing(placed: Placed, rng: np.random.Generator, level: Level | None) -> str:
    thing = placed.thing
    said = [_one(SHAPES[thing.shape], rng, level)]
    if thing.pattern == "plain":
        said.insert(0, _one(COLORS[thing.color1], rng, level))
    else:
        said.insert(0, str(rng.choice(PATTERNED)))
    if level is None and rng.random() < 0.3:
        said.insert(0, str(rng.choice(ADJECTIVES.learned)))
    if level is None and rng.random() < 0.4:
        size = "small" if placed.radius < SMALL else "large" if placed.radius > LARGE else ""
        said[:0] = [str(rng.choice(SIZES[size]))] if size else []
    return " ".join(said)


def _of(words: Words, level: Level | None) -> tuple[str, ...]:
    return words.plain + words.learned if level is None else getattr(words, level)


def _one(words: Words, rng: np.random.Generator, level: Level | None) -> str:
    """Plain words come as often as all learned ones together where there are few of them."""
    if level is None and words.plain and rng.random() < 0.25:
        return str(rng.choice(words.plain))
    return str(rng.choice(_of(words, level)))


def _article(words: str) -> str:
    return f"an {words}" if re.match("[aeiou]", words) else f"a {words}"
