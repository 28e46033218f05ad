"""The step `evaluate`: quality.json beside the weights, by the judge that saw none of the pictures.

How often the base draws what it is told, how well each subject is drawn and how like its
references, and how often a style's pictures are read as its artist's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from statistics import fmean

import numpy as np
import torch
from PIL import Image

from toybox.train.common import bf16

from .. import draw
from ..features import Features, Reader, drawn
from ..pipeline import EmojiPipeline, load
from ..sources import drawings, world
from .look import sheet_of
from .loras import REFERENCES, entries, examples, subject_prompt
from .place import Place

log = logging.getLogger(__name__)
EACH = 2  # pictures of every name that the base knows
SUBJECT, STYLE = 16, 48
OF = 32


def train(place: Place) -> dict:
    """Measure everything; sheets of pictures go to the work folder."""
    shown = drawings(place.cache)
    features = Features()
    names, known = list(shown), list(world()["names"])
    images, said, artists = drawn(shown, names)
    vectors = features.embed_images(images)
    things = Reader(features, vectors, said)
    hands = Reader(features, vectors, [str(artist) for artist in artists])
    seen = [row for row, name in enumerate(said) if name in world()["names"]]
    reader = Reader(features, vectors[seen], [said[row] for row in seen])
    figures: dict = {"of": OF, "drawn": _drawn(reader, hands, shown, known)}
    log.info("drawn: %s", figures["drawn"])
    pipeline = load(place.weights / "base")
    figures["base"] = base(pipeline, reader, known, place)
    log.info("base: %s", figures["base"])
    figures["loras"] = {}
    for token, entry in entries().items():
        path = place.weights / "loras" / f"{token}.safetensors"
        if path.exists():
            judge = subject if "name" in entry else style
            found = judge(place, entry, things if "name" in entry else hands, features, shown)
            figures["loras"][token] = found
            log.info("%s: %s", token, found)
    path = place.weights / "quality.json"
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures["base"]


def _drawn(reader: Reader, hands: Reader, shown, known: Sequence[str]) -> dict[str, float]:
    """What the judge reads rightly of other drawn pictures: no figure below can be higher."""
    images, said, artists = drawn(shown, known, pictures=2, seed=77)
    right = reader.right(images, said, OF)
    read = hands.likeness(images).argmax(1).tolist()
    by = [hands.names[i] == str(artist) for i, artist in zip(read, artists, strict=True)]
    return {"top1": round(fmean(right), 4), "artist": round(fmean(by), 4)}


@torch.no_grad()
def sample(pipeline: EmojiPipeline, prompts: Sequence[str], seed: int = 1) -> list[Image.Image]:
    """One picture a prompt, in batches."""
    generator, images = torch.Generator().manual_seed(seed), []
    for first in range(0, len(prompts), 32):
        with bf16():
            images += pipeline(list(prompts[first : first + 32]), generator=generator).images
    return images


def base(
    pipeline: EmojiPipeline, reader: Reader, known: Sequence[str], place: Place
) -> dict[str, float]:
    """Every name that it knows, on backgrounds in turn."""
    backgrounds = list(draw.BACKGROUNDS)
    shown = [name for name in known for _ in range(EACH)]
    prompts = [
        f"{draw.article(name)} on a {backgrounds[i % len(backgrounds)]} background"
        for i, name in enumerate(shown)
    ]
    images = sample(pipeline, prompts)
    sheets = place.work / "sheets"
    sheets.mkdir(exist_ok=True)
    picked = np.random.default_rng(3).permutation(len(images))[:64]
    sheet_of([images[i] for i in picked], 8).save(sheets / "base.png")
    (sheets / "base.txt").write_text("\n".join(prompts[i] for i in picked) + "\n")
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
    found: dict[str, float] = {}
    for when, images in without_and_with(place, entry["token"], prompts):
        likeness = (features.embed_images(images) @ references.T).mean()
        right = reader.right(images, [entry["name"]] * len(images), OF)
        found |= {f"likeness_{when}": round(float(likeness), 4), f"top1_{when}": fmean(right)}
    return found


def style(place: Place, entry: dict, reader: Reader, features: Features, shown) -> dict:
    """How often its artist is read off pictures of what the base knows, with and without."""
    own = str(list(world()["artists"]).index(entry["artist"]))
    backgrounds, names = list(draw.BACKGROUNDS), list(world()["names"])
    prompts = [
        f"{draw.article(names[i * 7 % len(names)])} on a {backgrounds[i % 8]} background "
        f"in {entry['token']} style"
        for i in range(STYLE)
    ]
    found: dict[str, float] = {}
    for when, images in without_and_with(place, entry["token"], prompts):
        read = [reader.names[i] == own for i in reader.likeness(images).argmax(1).tolist()]
        found[f"artist_{when}"] = round(fmean(read), 4)
    return found


def without_and_with(
    place: Place, token: str, prompts: Sequence[str]
) -> Iterator[tuple[str, list[Image.Image]]]:
    """What the base draws, then what it draws with the LoRA, of which a sheet is kept."""
    pipeline = load(place.weights / "base")
    yield "without", sample(pipeline, prompts)
    add_lora(pipeline, place, token)
    images = sample(pipeline, prompts)
    sheet_of(images, 8).save(place.work / "sheets" / f"{token}.png")
    yield "with", images


@torch.no_grad()
def add_lora(pipeline: EmojiPipeline, place: Place, token: str) -> None:
    """Add the file's changes to the pipeline's weights."""
    from iteris_core.hosts.diffusers import DiffusersHost

    host = DiffusersHost(pipeline)
    sites = host.sites()
    read = host.read_lora(place.weights / "loras" / f"{token}.safetensors")
    for site, change in read.sites.items():
        sites[site].weight += change.dense().reshape(sites[site].weight.shape)
