"""Where the training works, and what it keeps of how long it took."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from ..sources import drawings


@dataclass(frozen=True)
class Place:
    """Where the training works: checkpoints and pictures in `work`, finished files in `weights`;
    `only` are the LoRAs that are trained, on a base of `family`."""

    work: Path
    weights: Path
    only: tuple[str, ...] = ()
    family: str = "flux"

    @property
    def cache(self) -> Path:
        """Where the artists' packages and their drawings are kept."""
        return self.work / "pictures"

    def note(self, step: str, figures: dict) -> None:
        """Keep what a step took and came to, in train.json beside the weights."""
        path = self.weights / ("train.json" if self.family == "flux" else f"{self.family}.json")
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        kept[step] = {**kept.get(step, {}), **figures}
        self.weights.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def fetch(place: Place) -> dict:
    """The step `pictures`: fetch the six packages and render what the world shows; returns figures
    for train.json."""
    began = time.time()
    place.cache.mkdir(parents=True, exist_ok=True)
    found = drawings(place.cache)
    return {"seconds": round(time.time() - began), "names": len(found)}
