"""Images and captions of the toy world, drawn by a program.

A scene is a plain background with one or two things on it; a thing is a shape, a pattern and two
colours. Everything is drawn at four times the size and averaged down, so edges are anti-aliased.
Needs pillow and numpy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SHAPES = ("star", "circle", "square", "triangle", "ring", "cross")
PATTERNS = ("plain", "stripes", "halves", "quarters", "rim", "spot")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "yellow": (250, 215, 50),
    "green": (45, 160, 70),
    "cyan": (80, 210, 215),
    "blue": (40, 80, 205),
    "purple": (125, 50, 165),
    "pink": (245, 140, 190),
    "black": (25, 25, 28),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 245),
    "gray": (140, 140, 145),
    "black": COLORS["black"],
    "blue": COLORS["blue"],
    "green": COLORS["green"],
    "yellow": COLORS["yellow"],
    "pink": COLORS["pink"],
}
_OVERSAMPLE = 4
_CANVAS = SIZE * _OVERSAMPLE
_JITTER = 5  # levels of 255 by which a colour may differ from its name's own
_WIDE_PATTERNS = ("stripes", "halves", "quarters")  # those that also show on thin shapes
_PATTERNS_OF = {"ring": _WIDE_PATTERNS, "cross": _WIDE_PATTERNS}


@dataclass(frozen=True)
class Thing:
    """A thing to draw: shape, pattern, main colour and, unless plain, the pattern's colour."""

    shape: str
    color1: str
    pattern: str = "plain"
    color2: str = "none"


@dataclass(frozen=True)
class Placed:
    """A thing with its centre and radius in pixels of the 64 x 64 picture."""

    thing: Thing
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background and one or two placed things (of two, the left one comes first)."""

    background: str
    placed: tuple[Placed, ...]


def patterns_of(shape: str) -> tuple[str, ...]:
    """The patterns, without plain, that `shape` is wide enough to carry."""
    return _PATTERNS_OF.get(shape, PATTERNS[1:])


# -- drawing ------------------------------------------------------------------------------------


def _polygon(shape: str) -> list[tuple[float, float]]:
    if shape == "star":
        radii = (1.0, 0.5)
        angles = [math.radians(36 * i - 90) for i in range(10)]
        return [
            (radii[i % 2] * math.cos(a), radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)
        ]
    if shape == "square":
        return [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]
    if shape == "triangle":
        return [(0.0, -1.0), (0.98, 0.76), (-0.98, 0.76)]
    if shape == "cross":
        a, b = 0.36, 0.98
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    count = 48  # circle and ring
    return [
        (math.cos(2 * math.pi * i / count), math.sin(2 * math.pi * i / count)) for i in range(count)
    ]


_POLYGONS = {shape: _polygon(shape) for shape in SHAPES}


def _scaled(shape: str, x: float, y: float, radius: float, factor: float = 1.0):
    points = _POLYGONS[shape]
    mx = sum(p[0] for p in points) / len(points)
    my = sum(p[1] for p in points) / len(points)
    return [
        (x + radius * (mx + factor * (px - mx)), y + radius * (my + factor * (py - my)))
        for px, py in points
    ]


def _shape_mask(shape: str, x: float, y: float, radius: float) -> Image.Image:
    mask = Image.new("L", (_CANVAS, _CANVAS), 0)
    pen = ImageDraw.Draw(mask)
    pen.polygon(_scaled(shape, x, y, radius), fill=255)
    if shape == "ring":
        inner = 0.5 * radius
        pen.ellipse((x - inner, y - inner, x + inner, y + inner), fill=0)
    return mask


def _paint_pattern(
    pen: ImageDraw.ImageDraw,
    thing: Thing,
    x: float,
    y: float,
    radius: float,
    inner_color: tuple[int, int, int],
    color: tuple[int, int, int],
) -> None:
    r = radius * 1.05
    if thing.pattern == "stripes":
        for top in (-0.5, 0.5):
            pen.rectangle((x - r, y + top * radius, x + r, y + (top + 0.5) * radius), fill=color)
    elif thing.pattern == "halves":
        pen.rectangle((x, y - r, x + r, y + r), fill=color)
    elif thing.pattern == "quarters":
        pen.rectangle((x, y - r, x + r, y), fill=color)
        pen.rectangle((x - r, y, x, y + r), fill=color)
    elif thing.pattern == "rim":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=color)
        pen.polygon(_scaled(thing.shape, x, y, radius, 0.6), fill=inner_color)
    elif thing.pattern == "spot":
        s = 0.4 * radius
        if thing.shape == "triangle":
            y += 0.17 * radius
        pen.ellipse((x - s, y - s, x + s, y + s), fill=color)


def draw(scene: Scene, rng: np.random.Generator | None = None) -> Image.Image:
    """The picture of `scene`, RGB, 64 x 64; with `rng` the colours vary by a few levels."""

    def shade(color: tuple[int, int, int]) -> tuple[int, int, int]:
        if rng is None:
            return color
        moved = np.asarray(color) + rng.integers(-_JITTER, _JITTER + 1, 3)
        return tuple(int(v) for v in np.clip(moved, 0, 255))

    image = Image.new("RGB", (_CANVAS, _CANVAS), shade(BACKGROUNDS[scene.background]))
    for placed in scene.placed:
        x, y, radius = (v * _OVERSAMPLE for v in (placed.x, placed.y, placed.radius))
        thing = placed.thing
        main = shade(COLORS[thing.color1])
        paint = Image.new("RGB", (_CANVAS, _CANVAS), main)
        if thing.pattern != "plain":
            pen = ImageDraw.Draw(paint)
            _paint_pattern(pen, thing, x, y, radius, main, shade(COLORS[thing.color2]))
        image.paste(paint, mask=_shape_mask(thing.shape, x, y, radius))
    return image.reduce(_OVERSAMPLE)


# -- random scenes ------------------------------------------------------------------------------


def place_one(thing: Thing, background: str, rng: np.random.Generator) -> Scene:
    """`thing` alone, somewhere near the middle, 26 to 44 pixels wide (patterned: from 32)."""
    radius = rng.uniform(13.0 if thing.pattern == "plain" else 16.0, 22.0)
    slack = SIZE / 2 - radius - 2
    x, y = SIZE / 2 + rng.uniform(-slack, slack, 2)
    return Scene(background, (Placed(thing, float(x), float(y), float(radius)),))


def place_two(left: Thing, right: Thing, background: str, rng: np.random.Generator) -> Scene:
    """`left` and `right`, each within its half, 20 to 28 pixels wide."""
    placed = []
    for side, thing in enumerate((left, right)):
        radius = rng.uniform(10.5 if thing.pattern == "plain" else 12.0, 14.2)
        slack = SIZE / 4 - radius - 1
        x = SIZE / 4 + side * SIZE / 2 + rng.uniform(-slack, slack)
        y = SIZE / 2 + rng.uniform(-1, 1) * (SIZE / 2 - radius - 2) * 0.6
        placed.append(Placed(thing, float(x), float(y), float(radius)))
    return Scene(background, tuple(placed))


def random_thing(rng: np.random.Generator, background: str, patterned: float = 0.0) -> Thing:
    """A thing whose colours differ from `background`; patterned with that probability."""
    first, second = rng.choice([c for c in COLORS if c != background], 2, replace=False)
    shape = str(rng.choice(SHAPES))
    if rng.random() >= patterned:
        return Thing(shape, str(first))
    return Thing(shape, str(first), str(rng.choice(patterns_of(shape))), str(second))


def random_scene(rng: np.random.Generator, patterned: float = 0.0, two: float = 0.5) -> Scene:
    """A random scene; `two` is the probability of two things, which then differ in shape."""
    background = str(rng.choice(list(BACKGROUNDS)))
    thing = random_thing(rng, background, patterned)
    if rng.random() >= two:
        return place_one(thing, background, rng)
    other = random_thing(rng, background, patterned)
    if other == thing:
        shapes = [s for s in SHAPES if s != thing.shape]
        other = replace(other, shape=str(rng.choice(shapes)), pattern="plain", color2="none")
    return place_two(thing, other, background, rng)


# -- captions -----------------------------------------------------------------------------------

_PHRASES = {
    "stripes": "with {} stripes",
    "halves": "with a {} half",
    "quarters": "with {} quarters",
    "rim": "with a {} rim",
    "spot": "with a {} spot",
}


def describe(thing: Thing) -> str:
    """'red star with yellow stripes': every attribute in words, without an article."""
    if thing.pattern == "plain":
        return f"{thing.color1} {thing.shape}"
    return f"{thing.color1} {thing.shape} " + _PHRASES[thing.pattern].format(thing.color2)


def name_plainly(thing: Thing) -> str:
    """Like `describe`, but a patterned thing is just 'patterned': the base model's caption."""
    if thing.pattern == "plain":
        return describe(thing)
    return f"patterned {thing.shape}"


def compose(names: tuple[str, ...], background: str | None, relation: str = "left of") -> str:
    """'a NAME left of a NAME on a white background', from names without articles."""
    text = f" {relation} ".join(f"a {name}" for name in names)
    return text if background is None else f"{text} on a {background} background"


def caption(scene: Scene, rng: np.random.Generator | None = None, name=name_plainly) -> str:
    """The caption of `scene`; with `rng` its wording varies (order, prefix, background)."""
    names = tuple(name(p.thing) for p in scene.placed)
    if rng is None:
        return compose(names, scene.background)
    relation = "left of"
    if len(names) == 2:
        draw_relation = rng.random()
        if draw_relation > 0.75:
            names, relation = names[::-1], "right of"
        elif draw_relation > 0.6:
            relation = str(rng.choice(["and", "next to"]))
            names = names if rng.random() < 0.5 else names[::-1]
    text = compose(names, scene.background if rng.random() < 0.85 else None, relation)
    prefix = rng.random()
    if prefix < 0.15:
        return f"a photo of {text}"
    return f"a picture of {text}" if prefix < 0.25 else text
