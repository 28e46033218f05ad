"""The step `evaluate`: quality.json beside the weights, by the judge that saw none of the pictures.

How often the base draws what its prompt says, how well each subject is drawn, and how like its
references.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from statistics import fmean

import torch
from PIL import Image

from iteris_core.hosts.diffusers import DiffusersHost
from toybox.train.common import bf16

from ...protocol.drawing import changed
from .. import draw
from ..features import Features, Reader, drawn
from ..pipeline import EmojiPipeline, load
from ..sources import drawings, world
from .loras import REFERENCES, entries, examples, subject_prompt
from .place import Place

log = logging.getLogger(__name__)
EACH = 2  # pictures of every name that the base knows
SUBJECT = 16
OF = 32


def train(place: Place) -> dict:
    """Measure everything."""
    shown = drawings(place.cache)
    features = Features()
    names, known = list(shown), list(world()["names"])
    images, said = drawn(shown, names)
    vectors = features.embed_images(images)
    things = Reader(features, vectors, said)
    seen = [row for row, name in enumerate(said) if name in world()["names"]]
    reader = Reader(features, vectors[seen], [said[row] for row in seen])
    figures: dict = {"of": OF, "drawn": _drawn(reader, shown, known)}
    log.info("drawn: %s", figures["drawn"])
    pipeline = load(place.weights / "base")
    figures["base"] = base(pipeline, reader, known)
    log.info("base: %s", figures["base"])
    figures["loras"] = {}
    for token, entry in entries().items():
        path = place.weights / "loras" / f"{token}.safetensors"
        if path.exists():
            figures["loras"][token] = found = subject(place, entry, things, features, shown)
            log.info("%s: %s", token, found)
    path = place.weights / "quality.json"
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures["base"]


def _drawn(reader: Reader, shown, known: Sequence[str]) -> dict[str, float]:
    """What the judge reads rightly of other drawn pictures: no figure below can be higher."""
    images, said = drawn(shown, known, pictures=2, seed=77)
    return {"top1": round(fmean(reader.right(images, said, OF)), 4)}


@torch.no_grad()
def sample(pipeline: EmojiPipeline, prompts: Sequence[str], seed: int = 1) -> list[Image.Image]:
    """One picture a prompt, in batches."""
    generator, images = torch.Generator().manual_seed(seed), []
    for first in range(0, len(prompts), 32):
        with bf16():
            images += pipeline(list(prompts[first : first + 32]), generator=generator).images
    return images


def base(pipeline: EmojiPipeline, reader: Reader, known: Sequence[str]) -> dict[str, float]:
    """Every name that it knows, on backgrounds in turn."""
    backgrounds = list(draw.BACKGROUNDS)
    shown = [name for name in known for _ in range(EACH)]
    prompts = [
        f"{draw.article(name)} on a {backgrounds[i % len(backgrounds)]} background"
        for i, name in enumerate(shown)
    ]
    images = sample(pipeline, prompts)
    right = reader.right(images, shown, OF)
    return {"top1": round(fmean(right), 4), "pictures": len(images)}


def subject(place: Place, entry: dict, reader: Reader, features: Features, shown) -> dict:
    """Whether it is read as itself, and its likeness to the references, with and without."""
    references = features.embed_images(examples(entry, shown)[0][:REFERENCES])
    backgrounds = list(draw.BACKGROUNDS)
    prompts = [
        f"a {subject_prompt(entry)} on a {backgrounds[i % len(backgrounds)]} background"
        for i in range(SUBJECT)
    ]
    pipeline = load(place.weights / "base")
    host = DiffusersHost(pipeline)
    lora = host.read_lora(place.weights / "loras" / f"{entry['token']}.safetensors")
    found: dict[str, float] = {}
    for when, on in (("without", None), ("with", lora)):
        with changed(host, on):
            images = sample(pipeline, prompts)
        likeness = (features.embed_images(images) @ references.T).mean()
        right = reader.right(images, [entry["name"]] * len(images), OF)
        found |= {f"likeness_{when}": round(float(likeness), 4), f"top1_{when}": fmean(right)}
    return found
