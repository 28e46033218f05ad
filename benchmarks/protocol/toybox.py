"""The toybox as a world of the protocol: its own ten concepts, or the ten that are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

import toybox
from iteris_core import Concept, Lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.score import ClipScorer, without_tokens
from toybox.draw import BACKGROUNDS as SCENES
from toybox.draw import compose, describe, random_thing

from .drawing import draw
from .world import FIGURES, KINDS, Wanted

SEEN, NEW = ("white", "gray", "black"), ("blue", "green", "yellow", "pink")
"""Backgrounds that rows may have, and those of evaluation prompts."""

PLAINLY = ("a {}", "a photo of a {}", "a picture of a {}")
FRAMED = (*PLAINLY, *(compose(("{}",), background) for background in SEEN))
"""Templates of calibration, without and with the frame of evaluation prompts."""

EACH, SPREAD, PLAIN = 2, 4, 12
"""Pictures for each prompt with new words, seeds of one prompt, and prompts without a trigger."""


class ToyboxWorld:
    """``root`` is laid out like the toybox; without it the concepts are the toybox's own."""

    kinds = KINDS

    def __init__(self, root: Path = toybox.ROOT) -> None:
        self.pipeline = toybox.load_pipeline()
        self.host = DiffusersHost(self.pipeline)
        self.known = toybox.concepts(root)
        self.subjects = tuple(self.known)
        self._root = root
        self.judge = toybox.load_judge()
        self._scorer = ClipScorer(*toybox.load_clip())
        self._references = {
            name: self._scorer.embed_images(self.pictures_of(name)) for name in self.known
        }
        self._loras: dict[tuple[str, int], Lora] = {}
        self.trained = trainings(root, self.subjects)
        self.half = {"templates": FRAMED}
        self.words = frozenset(NEW)
        given = toybox.settings()
        self.sampling = {"num_inference_steps": given["steps"], "guidance_scale": given["guidance"]}

    def concepts(self, names: Sequence[str], trained: int = 0) -> list[Concept]:
        return [Concept(self._lora(n, trained), None, n, self.known[n].class_word) for n in names]

    def _lora(self, name: str, trained: int) -> Lora:
        if (name, trained) not in self._loras:
            folder = f"loras-{trained}" if trained else "loras"
            path = toybox.concepts(self._root, folder)[name].lora
            self._loras[name, trained] = self.host.read_lora(path)
        return self._loras[name, trained]

    def prompted(self, kind: str, names: Sequence[str], seed: int) -> list[Wanted]:
        if kind == "no trigger":
            return plain_prompts(PLAIN, seed)
        count = {"seen": 1, "spread": SPREAD}.get(kind, EACH)
        wanted, seeds = list[Wanted](), range(100 * seed, 100 * seed + count)
        for name in names:
            concept = self.known[name]
            phrase = f"{name} {concept.class_word}"
            if kind == "seen":
                texts = [(template.replace("{}", phrase), "") for template in PLAINLY]
            else:
                free = [b for b in concept.backgrounds if b in NEW]
                free = free[: 1 if kind == "spread" else None]
                texts = [(compose((phrase,), background), background) for background in free]
            for prompt, background in texts:
                wanted += [Wanted((name,), prompt, one, background) for one in seeds]
        return wanted

    def draw(self, lora: Lora | None, wanted: Sequence[Wanted]) -> list[Image.Image]:
        return draw(self.pipeline, self.host, lora, wanted, **self.sampling)

    def read(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> list[Mapping[str, float]]:
        """``likeness`` by the toybox's CLIP; ``judge``, the share of shape, pattern and both
        colours that are read rightly."""
        read = self.judge.read(images)
        scenes = [float(w.scene in ("", r.background)) for r, w in zip(read, wanted, strict=True)]
        if not wanted[0].shown:
            return [{"scene": scene} for scene in scenes]
        names, vectors = [w.shown[0] for w in wanted], self.embedded(images)
        plain = [without_tokens(w.prompt, self.subjects) for w in wanted]
        columns = (
            [float((self._references[n] @ v).mean()) for n, v in zip(names, vectors, strict=True)],
            [sum(r.matches(self.known[n].thing)) / 4 for n, r in zip(names, read, strict=True)],
            self._scorer.text_alignment(images, plain).tolist(),
            scenes,
        )
        return [dict(zip(FIGURES, one, strict=True)) for one in zip(*columns, strict=True)]

    def pictures_of(self, name: str) -> list[Image.Image]:
        return [Image.open(file).convert("RGB") for file in self.known[name].references]

    def embedded(self, images: Sequence[Image.Image]) -> Tensor:
        return self._scorer.embed_images(images)


def trainings(root: Path, subjects: Sequence[str]) -> int:
    """How many folders of LoRAs have all ``subjects``."""
    folders = (root / "weights").glob("loras*")
    return sum(all((at / f"{name}.safetensors").exists() for name in subjects) for at in folders)


def plain_prompts(count: int, seed: int) -> list[Wanted]:
    """Prompts of plain things, as the base's own captions are, on all backgrounds in turn."""
    rng = np.random.default_rng(seed)
    backgrounds = list(islice(cycle(SCENES), count))
    return [Wanted((), compose((describe(random_thing(rng, b)),), b), seed, b) for b in backgrounds]
