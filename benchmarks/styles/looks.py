"""Looks that any picture of the toybox can have, made of it by a program.

The toybox's autoencoder has learned flat areas in the toybox's colours, and draws no other colour.
So each look gives flat areas in those colours: a picture is parted into its areas at twice its
size, the areas are changed, and the result is averaged down. Needs pillow and numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageFilter

from toybox.draw import BACKGROUNDS, COLORS

Look = Callable[[Image.Image], Image.Image]

PALETTE = {**COLORS, **BACKGROUNDS}
_NAMES = tuple(PALETTE)
_VALUES = np.array([PALETTE[name] for name in _NAMES], dtype=float)
_OVERSAMPLE = 2
_PURE = 30.0
"""How far, in levels of 255, a pixel that is no edge lies from its colour at most."""
_FEW = 24
"""Pixels below which a colour is an edge's mixture, and no area's."""

_ACROSS = {"red": "cyan", "yellow": "blue", "green": "pink", "purple": "gray", "black": "white"}
_WHEEL = ("red", "yellow", "green", "cyan", "blue", "purple", "pink")

SWAPS: Mapping[str, Mapping[str, str]] = {
    "negative": {**_ACROSS, **{to: of for of, to in _ACROSS.items()}},
    "palette": {
        **dict(zip(_WHEEL, (*_WHEEL[1:], _WHEEL[0]), strict=True)),
        **{"white": "gray", "gray": "black", "black": "white"},
    },
}
"""Looks that only exchange colours, each for another one."""


def areas(picture: Image.Image) -> np.ndarray:
    """(2 x height, 2 x width): for each point the index of its colour in :data:`PALETTE`."""
    away = _distances(picture)
    nearest = away.argmin(-1)
    pure = nearest[away.min(-1) < _PURE**2]
    counts = np.bincount(pure, minlength=len(_NAMES))
    present = np.flatnonzero(counts >= min(_FEW, counts.max()))
    size = [side * _OVERSAMPLE for side in picture.size]
    large = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return present[_distances(large)[..., present].argmin(-1)]


def _distances(picture: Image.Image) -> np.ndarray:
    """(height, width, colour), squared."""
    values = np.asarray(picture.convert("RGB"), dtype=float)
    return (values**2).sum(-1, keepdims=True) - 2 * values @ _VALUES.T + (_VALUES**2).sum(1)


def _coloured(indices: np.ndarray) -> Image.Image:
    return Image.fromarray(_VALUES[indices].astype(np.uint8)).reduce(_OVERSAMPLE)


def _index(name: str) -> int:
    return _NAMES.index(name)


def _swapped(picture: Image.Image, swaps: Mapping[str, str]) -> Image.Image:
    table = np.array([_index(swaps[name]) for name in _NAMES])
    return _coloured(table[areas(picture)])


def sketch(picture: Image.Image) -> Image.Image:
    """Black lines, four pixels wide, along the edges of all areas, on white."""
    indices = Image.fromarray(areas(picture).astype(np.uint8))
    wide = 4 * _OVERSAMPLE + 1
    inner = np.asarray(indices.filter(ImageFilter.MinFilter(wide)))
    outer = np.asarray(indices.filter(ImageFilter.MaxFilter(wide)))
    return _coloured(np.where(inner == outer, _index("white"), _index("black")))


def negative(picture: Image.Image) -> Image.Image:
    """Each colour as the one across from it."""
    return _swapped(picture, SWAPS["negative"])


def pixel(picture: Image.Image) -> Image.Image:
    """Squares of eight pixels, each in the colour that most of it has."""
    side = 8 * _OVERSAMPLE
    indices = areas(picture)
    high, wide = (n // side for n in indices.shape)
    blocks = indices.reshape(high, side, wide, side).swapaxes(1, 2).reshape(high, wide, -1)
    counts = (blocks[..., None] == np.arange(len(_NAMES))).sum(2)
    return _coloured(counts.argmax(-1).repeat(side, 0).repeat(side, 1))


def palette(picture: Image.Image) -> Image.Image:
    """Each colour as the next one of the rainbow; white, gray and black in turn as well."""
    return _swapped(picture, SWAPS["palette"])


def ground(picture: Image.Image) -> str:
    """The colour of :data:`PALETTE` that is nearest to that of the outermost two pixels."""
    values = np.asarray(picture.convert("RGB"), dtype=float)
    outer = np.ones(values.shape[:2], dtype=bool)
    outer[2:-2, 2:-2] = False
    away = np.linalg.norm(_VALUES - np.median(values[outer], axis=0), axis=1)
    return _NAMES[int(away.argmin())]


def frame(picture: Image.Image) -> Image.Image:
    """A purple frame, eight pixels wide."""
    indices = areas(picture)
    edge = 8 * _OVERSAMPLE
    framed = np.full_like(indices, _index("purple"))
    framed[edge:-edge, edge:-edge] = indices[edge:-edge, edge:-edge]
    return _coloured(framed)


def porthole(picture: Image.Image) -> Image.Image:
    """Cyan outside of a circle that almost fills the picture."""
    indices = areas(picture)
    high, wide = indices.shape
    y, x = np.mgrid[-1 : 1 : high * 1j, -1 : 1 : wide * 1j]
    return _coloured(np.where(np.hypot(x, y) < 0.92, indices, _index("cyan")))


LOOKS: Mapping[str, Look] = {
    "sketch": sketch,
    "negative": negative,
    "pixel": pixel,
    "palette": palette,
    "frame": frame,
    "porthole": porthole,
}
