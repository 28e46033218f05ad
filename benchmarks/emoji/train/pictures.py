"""The step `pictures`: fetches the six packages and renders what the world shows."""

from __future__ import annotations

import time

from ..sources import drawings
from .place import Place


def fetch(place: Place) -> dict:
    """Fetch and render into the work folder; returns figures for train.json."""
    began = time.time()
    place.cache.mkdir(parents=True, exist_ok=True)
    found = drawings(place.cache)
    return {"seconds": round(time.time() - began), "names": len(found)}
