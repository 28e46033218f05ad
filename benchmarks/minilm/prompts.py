"""Captions of scenes, and prompts of a concept by how far their words are from those of a merge's
rows.

``words.json`` has ways to say each thing. ``plain`` words are the ones that LoRAs and calibration
templates use; ``learned`` words stand in captions of the base's training beside them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from captions import with_article, words_of

from toybox import ToyConcept
from toybox.draw import Placed, Scene

Words = Mapping[Literal["plain", "learned"], Sequence[str]]
Kind = Literal["seen", "new"]

_WORDS: Mapping[str, Any] = json.loads(
    Path(__file__).with_name("words.json").read_text(encoding="utf-8")
)
SEEN = ("white", "gray", "black", "blue")
"""Backgrounds of the calibration templates."""

ASIDE = frozenset(_WORDS["aside"])
"""Learned words that generic rows leave out, so that prompts can be made of words of no row."""

SMALL = frozenset(_WORDS["small"])
"""Words that mean no thing and no scene; prompts of all kinds share them."""

_RADII = 16.0, 19.5
"""Under and over which a thing may be called small or large."""


@dataclass(frozen=True)
class Prompt:
    """What is asked for, and the background that it means."""

    text: str
    background: str


def templates(backgrounds: Sequence[str] = SEEN) -> list[str]:
    """Those of calibration, with "{}" for the concept: every plain frame on every plain surface of
    the backgrounds."""
    return [
        template.format(thing="a {}", scene=f"on a {adjective} {surface}")
        for background in backgrounds
        for adjective in _WORDS["grounds"][background]["plain"]
        for surface in _WORDS["surfaces"]["plain"]
        for template in _WORDS["frames"]["plain"]
    ]


def prompts(concept: ToyConcept, kind: Kind, count: int) -> list[Prompt]:
    """``count`` of them, always the same.

    ``seen`` are calibration prompts. Of ``new`` all words but the concept's own and small ones are
    of :data:`ASIDE`, which no row has.
    """
    rng = np.random.default_rng(zlib.crc32(f"{concept.token} {kind}".encode()))
    level: Any = "plain" if kind == "seen" else "learned"
    free = [b for b in concept.backgrounds if kind != "seen" or b in SEEN]
    found: list[Prompt] = []
    for background in islice(cycle(rng.permutation(free)), count):
        while True:
            template = str(rng.choice(_WORDS["frames"][level]))
            scene = _scene(str(background), rng, level)
            words = words_of(template.format(thing="", scene=scene))
            if kind == "seen" or words - SMALL <= ASIDE:
                break
        text = template.format(thing=concept.instance_prompt, scene=scene)
        found.append(Prompt(text, str(background)))
    return found


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Of a scene with one thing, as the base hears it, in plain and in learned words."""
    return said(with_article(_thing(scene.placed[0], rng)), scene.background, rng)


def said(thing: str, background: str, rng: np.random.Generator) -> str:
    """Of a thing on a background, in plain and in learned words."""
    if rng.random() < 0.05:
        return thing
    where = _scene(background, rng)
    return _one(_WORDS["frames"], rng).format(thing=thing, scene=where)


def _scene(background: str, rng: np.random.Generator, level: str = "") -> str:
    """A place, or a surface of a colour: "on a lawn", "against an emerald curtain"."""
    places = _WORDS["scenes"][background]
    if _of(places, level) and rng.random() < 0.5:
        return _one(places, rng, level)
    colour = _one(_WORDS["grounds"][background], rng, level)
    surface = f"{colour} {_one(_WORDS['surfaces'], rng, level)}"
    before = "against" if not level and rng.random() < 0.3 else "on"
    return f"{before} {with_article(surface)}"


def _thing(placed: Placed, rng: np.random.Generator) -> str:
    """Of a thing with a pattern neither which one nor its colours."""
    thing = placed.thing
    said = [_one(_WORDS["shapes"][thing.shape], rng)]
    if thing.pattern == "plain":
        said.insert(0, _one(_WORDS["colors"][thing.color1], rng))
    else:
        said.insert(0, str(rng.choice(_WORDS["patterned"])))
    if rng.random() < 0.3:
        said.insert(0, str(rng.choice(_WORDS["adjectives"])))
    if rng.random() < 0.4:
        least, most = _RADII
        size = "small" if placed.radius < least else "large" if placed.radius > most else ""
        said[:0] = [str(rng.choice(_WORDS["sizes"][size]))] if size else []
    return " ".join(said)


def _of(words: Words, level: str) -> Sequence[str]:
    return words[level] if level else [*words["plain"], *words["learned"]]


def _one(words: Words, rng: np.random.Generator, level: str = "") -> str:
    """Plain words come as often as all learned ones together where there are few of them."""
    if not level and words["plain"] and rng.random() < 0.25:
        return str(rng.choice(words["plain"]))
    return str(rng.choice(_of(words, level)))
