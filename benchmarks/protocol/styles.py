"""The toybox's subjects with the styles of ``benchmarks/styles``, on backgrounds that no row had.

Their colours are not new words: things in a style's rows have them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import fmean
from typing import Any

import numpy as np
import styles
from PIL import Image
from styles.reader import ATTRIBUTES, Styled
from styles.reader import load as load_reader

from iteris_core import Concept, Lora
from toybox.draw import Thing, compose, describe, random_thing

from .plan import SINGLE, Plan, Unit
from .runs import Entry, Runs
from .toybox import NEW, SEEN, ToyboxWorld, plain_prompts
from .world import Wanted

ROWS = 50
"""Prompts of a style's calibration."""

PLAIN, EACH = 6, 2
"""Prompts without a trigger, and pictures for each other prompt."""

READABLE = 0.8
"""Share of drawn pictures in a style from which an attribute of the thing must be read rightly to
count there: a sketch has no colours."""


class StyleWorld(ToyboxWorld):
    """Kinds of prompt: ``styled`` is of a subject in a style; ``subject`` and ``style`` of one of
    them, while both are merged."""

    kinds = ("styled", "subject", "style", "no trigger")

    def __init__(self) -> None:
        super().__init__()
        self._styles = styles.styles()
        self.styles = tuple(self._styles)
        self._reader = load_reader(styles.ROOT / "weights")
        quality = json.loads((styles.ROOT / "weights" / "quality.json").read_text())["reader"]
        self._readable = {
            style: [name for name in ATTRIBUTES if of[name] >= READABLE]
            for style, of in quality.items()
        }
        self.words = frozenset[str]()  # the frame of a style's rows is that of its pictures
        self._style_loras: dict[str, Lora] = {}

    def concepts(self, names: Sequence[str], trained: int) -> list[Concept]:
        known = self._styles
        return [self._style(n) if n in known else self._subject(n, trained) for n in names]

    def _subject(self, name: str, trained: int) -> Concept:
        (concept,) = super().concepts([name], trained)
        return concept

    def _style(self, name: str) -> Concept:
        style = self._styles[name]
        if name not in self._style_loras:
            self._style_loras[name] = self.host.read_lora(style.lora)
        rng = np.random.default_rng(1)
        prompts = [
            f"{compose((describe(random_thing(rng, b or '')),), b)} {style.words}"
            for b in islice(cycle((*SEEN, None)), ROWS)
        ]
        return Concept(self._style_loras[name], prompts, style.words, kind="style")

    def prompted(self, kind: str, names: Sequence[str], seed: int) -> list[Wanted]:
        if kind == "no trigger":
            return plain_prompts(PLAIN, seed)
        subject, style = names
        words = self._styles[style].words
        seeds = range(100 * seed, 100 * seed + EACH)
        if kind == "style":
            return [
                Wanted((style,), f"{compose((thing,), b)} {words}", one, b)
                for one in seeds
                for b, thing in _things(one)
            ]
        concept = self.known[subject]
        ending = f" {words}" if kind == "styled" else ""
        shown = (subject, style) if kind == "styled" else (subject,)
        return [
            Wanted(shown, compose((f"{subject} {concept.class_word}",), b) + ending, one, b)
            for b in concept.backgrounds
            if b in NEW
            for one in seeds
        ]

    def read(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> list[Mapping[str, float]]:
        """``style``: whether the picture is read as the style's, or as plain where none is
        requested. Of a subject in a style ``judge`` is the share of the attributes that can be
        read in the style, and ``both`` that share of pictures in the style, 0 of others."""
        seen = self._reader.read(images, [w.scene for w in wanted])
        if not wanted[0].shown:
            return super().read(images, wanted)
        if len(wanted[0].shown) == 1 and wanted[0].shown[0] in self.subjects:
            of_subject = super().read(images, wanted)
            return [
                {**figures, "style": float(s.style == styles.PLAIN)}
                for figures, s in zip(of_subject, seen, strict=True)
            ]
        return [self._in_style(s, w) for s, w in zip(seen, wanted, strict=True)]

    def _in_style(self, seen: Styled, wanted: Wanted) -> dict[str, float]:
        *subject, style = wanted.shown
        if subject:
            thing = self.known[subject[0]].thing
        else:
            _, color, shape, *_ = wanted.prompt.split()
            thing = Thing(shape, color)
        matches = seen.matches(thing)
        judge = fmean(matches[name] for name in self._readable[style])
        in_style = float(seen.style == style)
        return {"judge": judge, "style": in_style, "both": judge * in_style}


def _things(seed: int) -> Iterator[tuple[str, str]]:
    """A plain thing for each new background."""
    rng = np.random.default_rng(seed)
    return ((b, describe(random_thing(rng, b))) for b in NEW)


@dataclass(frozen=True)
class StyledPlan(Plan):
    """Pairs of a subject with a style. What each LoRA alone and the base have is also of a pair,
    since its prompts are."""

    def references_of(self, method: str, names: Sequence[str], replicate: int) -> list[Unit]:
        return [Unit(method, tuple(names), replicate=replicate)]

    def sets(self, size: int, replicate: int) -> list[tuple[str, ...]]:
        """A subject for each style, and every subject once where there are more of them."""
        subjects, names = self.world.subjects, self.world.styles
        order = np.random.default_rng(replicate).permutation(len(subjects))
        pairs = [
            (subjects[order[i % len(subjects)]], names[i % len(names)])
            for i in range(max(len(subjects), len(names)))
        ]
        return pairs[: self.per_size]


class StyledRuns(Runs):
    """Of each LoRA alone, figures of the subject are with the subject's LoRA and those of the style
    with the style's."""

    def measure(self, unit: Unit) -> Entry:
        if unit.method != SINGLE:
            return super().measure(unit)
        of_subject, of_style = (
            {kind: self._of(concept.lora, kind, unit) for kind in ("styled", own, "no trigger")}
            for concept, own in zip(
                self.world.concepts(unit.names, unit.trained), ("subject", "style"), strict=True
            )
        )
        return {
            "styled": [
                _each_alone(*rows)
                for rows in zip(of_subject["styled"], of_style["styled"], strict=True)
            ],
            "subject": of_subject["subject"],
            "style": of_style["style"],
            "no trigger": of_subject["no trigger"] + of_style["no trigger"],
        }


def _each_alone(of_subject: Any, of_style: Any) -> list[Any]:
    name, subject = of_subject
    judge, style = subject["judge"], of_style[1]["style"]
    return [name, {"judge": judge, "style": style, "both": judge * style}]
