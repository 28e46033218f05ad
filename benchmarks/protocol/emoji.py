"""The world of emoji as a world of the protocol: things and artists that its base does not know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from statistics import fmean
from typing import Any

import emoji
import numpy as np
import torch
from emoji.draw import BACKGROUNDS, SIZE, article
from emoji.features import Features
from emoji.sources import world
from emoji.tokenizer import LENGTH
from PIL import Image

from iteris_core import Concept, Lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.score import ClipScorer, without_tokens

from .drawing import draw
from .in_a_row import Part, flux, ring
from .world import FIGURES, KINDS, Judged, Wanted

REPORTED = 10
"""The last ten subjects are reported, as many as SSR-Merge's paper has; the search for the rivals'
settings has the ones before."""

EACH = 2
"""Backgrounds on which each is drawn with one seed, the next ones with the next."""

SEEN, NEW = tuple(BACKGROUNDS)[:4], tuple(BACKGROUNDS)[4:]
"""Backgrounds that the half of the templates has, and those that it does not have."""

SPREAD, PLAIN = 4, 8
"""Seeds of one prompt, and prompts without a trigger."""

_NEAR = 40.0
"""How far, in levels of 255, a picture's edge may lie from a background's own colour."""

_BESIDE = ("ladybug", "frog", "koala", "snail")


class EmojiWorld:
    """``tuning`` has the subjects that are not reported. Pictures of a style are held against its
    artist's, which lie where the subjects' references do."""

    sizes = (2, 3, 5, 7, 9)
    kinds = KINDS
    trained = 1
    calls = 2 * world()["sampling"]["steps"]
    roots = (emoji.ROOT,)

    def __init__(self, *, tuning: bool = False) -> None:
        self.pipeline = emoji.load_pipeline()
        self.host = DiffusersHost(self.pipeline)
        self._subjects, self._styles = emoji.subjects(), emoji.styles()
        every = list(self._subjects)
        self.subjects = tuple(every[:-REPORTED] if tuning else every[-REPORTED:])
        self.styles = () if tuning else tuple(self._styles)
        self.calibration: dict[str, Any] = {"templates": templates()}
        known = ("a {}", "{}", *(f"a {{}} on a {background} background" for background in SEEN))
        self.half: dict[str, Any] = {"templates": known}
        self._judges = {"image": Features(), "clip": ClipScorer(*emoji.load_clip())}
        self._references: dict[tuple[str, str], torch.Tensor] = {}
        self._loras: dict[str, Lora] = {}

    def concepts(self, names: Sequence[str], trained: int) -> list[Concept]:
        return [self._concept(name) for name in names]

    def _concept(self, name: str) -> Concept:
        of = self._subjects.get(name) or self._styles[name]
        if name not in self._loras:
            self._loras[name] = self.host.read_lora(of.lora)
        if name in self._styles:
            words = self._styles[name].words
            known = islice(zip(cycle(BACKGROUNDS), world()["names"]), 50)
            prompts = [
                f"{article(n)} on a {background} background {words}" for background, n in known
            ]
            return Concept(self._loras[name], prompts, words, kind="style")
        return Concept(self._loras[name], None, name, self._subjects[name].kind)

    def alone(self, name: str, seed: int) -> list[Wanted]:
        what = self._subjects[name].prompt
        return [Wanted((name,), f"a {what} on a {b} background", seed) for b in _backgrounds(seed)]

    def rows(self, names: Sequence[str], count: int, seed: int) -> list[Wanted]:
        """Each ``count`` neighbours side by side, those across the end as well."""
        return [Wanted(shown, self._in_a_row(shown, seed), seed) for shown in ring(names, count)]

    def _in_a_row(self, shown: Sequence[str], seed: int) -> str:
        things = " left of ".join(f"a {self._subjects[name].prompt}" for name in shown)
        return f"{things} on a {_backgrounds(seed)[0]} background"

    def prompts_of_regions(self, wanted: Sequence[Wanted]) -> list[list[str]]:
        """For each region a prompt of two of its own subject."""
        regions = range(len(wanted[0].shown))
        return [[self._in_a_row([one.shown[at]] * 2, one.seed) for one in wanted] for at in regions]

    def prompted(self, kind: str, names: Sequence[str], seed: int) -> list[Wanted]:
        if kind == "no trigger":
            things = np.random.default_rng(seed).permutation(list(world()["names"]))
            return [
                Wanted((), f"{article(str(thing))} on a {b} background", seed, b)
                for thing, b in zip(things[:PLAIN], cycle(BACKGROUNDS), strict=False)
            ]
        backgrounds = {"seen": SEEN, "new words": NEW, "spread": NEW[:1]}[kind]
        return [
            Wanted((name,), f"a {self._subjects[name].prompt} on a {b} background", one, b)
            for name in names
            for b in backgrounds
            for one in range(100 * seed, 100 * seed + (SPREAD if kind == "spread" else 1))
        ]

    def draw(self, lora: Lora | None, wanted: Sequence[Wanted]) -> list[Image.Image]:
        return draw(self.pipeline, self.host, lora, wanted)

    def draw_row(self, parts: Sequence[Part], wanted: Sequence[Wanted]) -> list[Image.Image]:
        """Composition by regions: at every step each is denoised by its LoRA and prompts."""
        return flux(self.pipeline, self.host, parts, wanted, SIZE, LENGTH)

    def row_read(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> list[tuple[float, bool]]:
        """The share of the subjects that are found in their regions, and whether all are."""
        found: list[tuple[float, bool]] = []
        for image, one in zip(images, wanted, strict=True):
            seen = [self._likest(_region(image, at)) == name for at, name in enumerate(one.shown)]
            found.append((fmean(seen), all(seen)))
        return found

    def likeness(self, images: Sequence[Image.Image], names: Sequence[str]) -> Judged:
        """``image`` by features that saw none of these pictures, ``clip`` by the world's CLIP."""
        return {
            judge: [
                float((self._embedded(judge, name) @ vector).mean())
                for name, vector in zip(names, scorer.embed_images(images), strict=True)
            ]
            for judge, scorer in self._judges.items()
        }

    def read(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> list[Mapping[str, float]]:
        """``judge``: 1 where the picture is more like the subject's references than like any other
        subject's, by the features that saw none of these pictures."""
        scenes = [float(_scene(i) == w.scene) for i, w in zip(images, wanted, strict=True)]
        if not wanted[0].shown:
            return [{"scene": scene} for scene in scenes]
        names = [w.shown[0] for w in wanted]
        likeness = self.likeness(images, names)["image"]
        judged = [float(self._likest(i) == n) for i, n in zip(images, names, strict=True)]
        columns = (likeness, judged, self.text_alignment(images, wanted), scenes)
        return [dict(zip(FIGURES, one, strict=True)) for one in zip(*columns, strict=True)]

    def embedded(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return self._judges["clip"].embed_images(images)

    def _embedded(self, judge: str, name: str) -> torch.Tensor:
        if (judge, name) not in self._references:
            files = sorted((emoji.ROOT / "references" / name).glob("*.png"))
            pictures = [Image.open(file).convert("RGB") for file in files]
            self._references[judge, name] = self._judges[judge].embed_images(pictures)
        return self._references[judge, name]

    def text_alignment(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> Sequence[float]:
        rare = [*self._subjects, *self._styles]
        plain = [without_tokens(w.prompt, rare) for w in wanted]
        clip = self._judges["clip"]
        return clip.text_alignment(images, plain).tolist()

    def _likest(self, image: Image.Image) -> str:
        (vector,) = self._judges["image"].embed_images([image])
        return max(
            self._subjects, key=lambda name: float((self._embedded("image", name) @ vector).mean())
        )


def _region(image: Image.Image, at: int) -> Image.Image:
    """The square in which the base draws a thing of a row, as large as a picture of one thing."""
    half = SIZE // 2
    square = image.crop((half * at, half // 2, half * (at + 1), half // 2 + half))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _scene(image: Image.Image) -> str:
    """The background whose colour the outermost two pixels have: things stand in the middle."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[2:-2, 2:-2] = True
    edge = np.median(pixels[~inner], axis=0)
    away = {name: float(np.linalg.norm(edge - colour)) for name, colour in BACKGROUNDS.items()}
    nearest = min(away, key=lambda name: away[name])
    return nearest if away[nearest] < _NEAR else "none"


def templates() -> tuple[str, ...]:
    """For calibration, in the world's own words: alone, and beside what the base knows."""
    alone = ["a {}", *(f"a {{}} on a {background} background" for background in BACKGROUNDS)]
    beside = [
        f"{pair} on a {background} background"
        for background, name in zip(cycle(BACKGROUNDS), _BESIDE * 2)
        for pair in (f"a {{}} left of {article(name)}", f"{article(name)} left of a {{}}")
    ]
    return (*alone, *beside)


def _backgrounds(seed: int) -> list[str]:
    return list(islice(cycle(BACKGROUNDS), EACH * seed, EACH * (seed + 1)))
