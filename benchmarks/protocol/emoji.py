"""The world of emoji as a world of the protocol: things and artists that its base does not know."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import emoji
import torch
from emoji.draw import BACKGROUNDS, SIZE, article
from emoji.features import Features
from emoji.sources import world
from emoji.tokenizer import LENGTH
from PIL import Image

from iteris_core import Concept, Lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.score import ClipScorer, without_tokens
from toybox.judge import halves

from .drawing import draw
from .in_a_row import Part, flux, ring
from .world import Judged, Wanted

REPORTED = 10
"""The last ten subjects are reported, as many as SSR-Merge's paper has; the search for the rivals'
settings has the ones before."""

EACH = 2
"""Backgrounds on which each is drawn with one seed, the next ones with the next."""

_BESIDE = ("ladybug", "frog", "koala", "snail")


class EmojiWorld:
    """``tuning`` has the subjects that are not reported. Pictures of a style are held against its
    artist's, which lie where the subjects' references do."""

    sizes = (2, 3, 5, 7, 9)
    trained = 1
    calls = 2 * world()["sampling"]["steps"]

    def __init__(self, *, tuning: bool = False) -> None:
        self.pipeline = emoji.load_pipeline()
        self.host = DiffusersHost(self.pipeline)
        self._subjects, self._styles = emoji.subjects(), emoji.styles()
        every = list(self._subjects)
        self.subjects = tuple(every[:-REPORTED] if tuning else every[-REPORTED:])
        self.styles = () if tuning else tuple(self._styles)
        self.collapse_below = (_halfway(every[:-REPORTED]),)
        self.calibration: dict[str, Any] = {"templates": templates()}
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
            return Concept(self._loras[name], prompts, name)
        return Concept(self._loras[name], None, name, self._subjects[name].kind)

    def alone(self, name: str, seed: int) -> list[Wanted]:
        what = self._subjects[name].prompt
        return [Wanted((name,), f"a {what} on a {b} background", seed) for b in _backgrounds(seed)]

    def together(self, names: Sequence[str], seed: int) -> list[Wanted]:
        """Each two neighbours side by side, the first and the last as well: the base draws no more
        than two things."""
        return self.rows(names, 2, seed) if len(names) > 1 else []

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

    def styled(self, subject: str, style: str, seed: int) -> list[Wanted]:
        what, words = self._subjects[subject].prompt, self._styles[style].words
        return [
            Wanted((subject, style), f"a {what} on a {background} background {words}", seed)
            for background in _backgrounds(seed)
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

    def crops(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> list[tuple[Image.Image | None, ...]]:
        """The halves; a subject is found where the independent features of its half are more like
        its own references than like those of any other subject of the world."""
        return [
            tuple(
                half if self._likest(half) == name else None
                for half, name in zip(halves(image), w.shown, strict=True)
            )
            for image, w in zip(images, wanted, strict=True)
        ]

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


def _halfway(names: Sequence[str]) -> float:
    """Between the base and each LoRA alone, of subjects that are not reported."""
    path = Path(emoji.ROOT) / "weights" / "quality.json"
    found = [json.loads(path.read_text())["loras"][name] for name in names]
    means = [fmean(of[f"likeness_{when}"] for of in found) for when in ("with", "without")]
    return round(fmean(means), 3)
