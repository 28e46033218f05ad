"""Pictures and captions: one drawing on a coloured background, or two beside each other.

A scene names what is shown and where; which artist drew each thing is part of it, and no caption
says so, except where a style is learned. Needs pillow and numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .sources import world

SIZE = 64
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (150, 150, 155),
    "black": (25, 25, 28),
    "blue": (55, 105, 215),
    "green": (60, 165, 85),
    "yellow": (250, 220, 90),
    "pink": (245, 165, 200),
    "red": (205, 45, 50),
}
JITTER = 6
"""Levels of 255 by which a background differs from its name's own colour."""

SLIP = 2
"""Pixels by which a thing is off the middle at most: so small a base learns sooner what things look
like where it need not learn to draw them anywhere."""

PLURALS = frozenset({"cherries", "grapes", "french fries", "glasses", "jeans", "scissors"})
PLURALS |= {"dice", "thumbs up"}


@dataclass(frozen=True)
class Placed:
    """A drawing: what it shows, by which artist (its number), its corner and side in pixels."""

    name: str
    artist: int
    x: int
    y: int
    side: int


@dataclass(frozen=True)
class Scene:
    """A background and one or two drawings (of two, the left or the upper one comes first)."""

    background: str
    placed: tuple[Placed, ...]
    above: bool = False


def random_scene(
    rng: np.random.Generator, names: Sequence[str], artists: Sequence[int], two: float
) -> Scene:
    """One of `names` by one of `artists`, or with the share `two` two of them by one artist."""
    artist = int(rng.choice(np.asarray(artists)))
    if rng.random() < two:
        shown = [str(n) for n in rng.choice(np.asarray(names), 2, replace=False)]
        return place_two(shown, artist, _background(rng), rng, above=rng.random() < 0.25)
    return place_one(str(rng.choice(np.asarray(names))), artist, _background(rng), rng)


def place_one(name: str, artist: int, background: str, rng: np.random.Generator) -> Scene:
    """The drawing 48 to 56 pixels wide, in the middle or almost."""
    side = 4 * int(rng.integers(12, 15))
    corner = [(SIZE - side) // 2 + int(rng.integers(-SLIP, SLIP + 1)) for _ in range(2)]
    return Scene(background, (Placed(name, artist, *corner, side),))


def place_two(
    names: Sequence[str],
    artist: int | Sequence[int],
    background: str,
    rng: np.random.Generator,
    *,
    above: bool = False,
) -> Scene:
    """Each in its half, 28 or 30 pixels wide."""
    artists = [artist] * 2 if isinstance(artist, int) else artist
    placed: list[Placed] = []
    for i, name in enumerate(names):
        side = 28 + 2 * int(rng.integers(0, 2))
        along = 32 * i + (32 - side) // 2
        across = (SIZE - side) // 2 + int(rng.integers(-SLIP, SLIP + 1))
        x, y = (across, along) if above else (along, across)
        placed.append(Placed(name, artists[i], x, y, side))
    return Scene(background, tuple(placed), above)


def draw(
    scene: Scene, drawings: Mapping[str, Sequence[Image.Image]], rng: np.random.Generator
) -> Image.Image:
    """The picture of a scene, 64 pixels wide, without transparency."""
    colour = np.array(BACKGROUNDS[scene.background]) + rng.integers(-JITTER, JITTER + 1, 3)
    picture = Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in colour.clip(0, 255)))
    for placed in scene.placed:
        drawing = drawings[placed.name][placed.artist]
        drawing = drawing.convert("RGBa").resize((placed.side,) * 2, Image.Resampling.BOX)
        drawing = drawing.convert("RGBA")
        picture.paste(drawing, (placed.x, placed.y), drawing)
    return picture


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The scene in words; with `rng` as people caption, sometimes by kind or without background."""
    things = [_thing(placed.name, rng) for placed in scene.placed]
    if len(things) == 2:
        first, second = things
        between = ("above", "below") if scene.above else ("left of", "right of")
        roll = rng.random() if rng else 0.0
        if roll < 0.7:
            words = f"{first} {between[0]} {second}"
        elif roll < 0.85:
            words = f"{second} {between[1]} {first}"
        else:
            words = f"{first} and {second}"
    else:
        words = things[0]
    if rng and rng.random() < 0.1:
        return words
    return f"{words} on a {scene.background} background"


def article(words: str) -> str:
    """The words with "a" or "an", or as they are where they are many."""
    if words in PLURALS:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _thing(name: str, rng: np.random.Generator | None) -> str:
    """Its name, one time in ten its kind alone."""
    entry = world()["names"].get(name) or world()["held_out"][name]
    return article(entry["kind"] if rng and rng.random() < 0.1 else name)


def _background(rng: np.random.Generator) -> str:
    return str(rng.choice(np.asarray(list(BACKGROUNDS))))
