"""The looks of ``benchmarks/styles``, and what tells those apart that only exchange colours.

The toybox's autoencoder has learned flat areas in the toybox's colours, and draws no other colour.
The program that gives a picture a look is at commit cc0405a.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from toybox.draw import BACKGROUNDS, COLORS

LOOKS = ("sketch", "negative", "pixel", "palette", "frame", "porthole")
PALETTE = {**COLORS, **BACKGROUNDS}

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


def ground(picture: Image.Image) -> str:
    """The colour of :data:`PALETTE` that is nearest to that of the outermost two pixels."""
    values = np.asarray(picture.convert("RGB"), dtype=float)
    outer = np.ones(values.shape[:2], dtype=bool)
    outer[2:-2, 2:-2] = False
    colours = np.array(list(PALETTE.values()), dtype=float)
    away = np.linalg.norm(colours - np.median(values[outer], axis=0), axis=1)
    return list(PALETTE)[int(away.argmin())]
