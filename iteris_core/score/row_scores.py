"""Scores of one row of a comparison: per image, and their means over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from ..concepts import Concept
from .judged import labels_of
from .scorers import ClipScorer, DinoScorer, without_tokens
from .statistics import Stat, over_seeds

BASE, ALONE = "base", "alone"
"""Rows without a LoRA, and with each LoRA by itself."""


@dataclass(frozen=True)
class Measure:
    """Scores of one row's images. ``judged[i]`` are the prompts that judge concept i;
    ``references[i]`` are images of it."""

    concepts: Sequence[Concept]
    references: Sequence[Sequence[Image.Image]]
    prompts: Sequence[str]
    judged: Sequence[Sequence[int]]
    scorer: ClipScorer
    dino: DinoScorer | None

    @cached_property
    def labels(self) -> list[str]:
        return labels_of(self.concepts)

    @cached_property
    def _embedded(self) -> list[Tensor]:
        return [self.scorer.embed_images(pictures) for pictures in self.references]

    def __call__(
        self, images: Sequence[Image.Image], drawn: Sequence[int], merged: Sequence[int], seeds: int
    ) -> dict[str, Tensor]:
        """Column → a value for each of ``images``, which are in the order of prompts ``drawn`` ×
        ``seeds``; NaN if a column does not apply to an image."""
        numbers = [index for index in drawn for _ in range(seeds)]
        prompts = [self.prompts[index] for index in numbers]
        vectors = self.scorer.embed_images(images)
        columns: dict[str, Tensor] = {}
        for index in merged:
            values = (vectors @ self._embedded[index].mT).mean(dim=1)
            columns[f"image {self.labels[index]}"] = self._where_judged(index, values, numbers)
        likeness = torch.stack(list(columns.values()))
        tokens = [concept.trigger for concept in self.concepts if concept.trigger]
        plain = [without_tokens(prompt, tokens) for prompt in prompts]
        text = (vectors * self.scorer.embed_texts(plain)).sum(dim=1)
        columns["text"] = text
        columns["text, tokens kept"] = (vectors * self.scorer.embed_texts(prompts)).sum(dim=1)
        columns["mean"] = (likeness.nanmean(dim=0) + text) / 2
        if self.dino is not None:
            for index in merged:
                values = self.dino.image_alignment(images, self.references[index])
                columns[f"dino {self.labels[index]}"] = self._where_judged(index, values, numbers)
        return columns

    def _where_judged(self, concept: int, values: Tensor, numbers: Sequence[int]) -> Tensor:
        judged = torch.tensor([number in self.judged[concept] for number in numbers])
        return values.masked_fill(~judged, math.nan)


def add_shares(columns: Mapping[str, dict[str, Tensor]], labels: Sequence[str]) -> None:
    """Add each row's share of each concept's likeness under its LoRA alone, on the same prompts.
    Nothing is added until every LoRA has been drawn alone; a likeness of 0 or less gets no
    share."""
    alone: dict[str, float] = {}
    for label in labels:
        if f"{ALONE} {label}" not in columns:
            return
        alone[label] = float(columns[f"{ALONE} {label}"][f"image {label}"].nanmean())
    known = {label: most for label, most in alone.items() if most > 0}
    for row, values in columns.items():
        if known and not row.startswith(f"{ALONE} "):
            shares = [values[f"image {label}"] / most for label, most in known.items()]
            values["share"] = torch.stack(shares).nanmean(dim=0)


def stats_of(columns: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Stat]:
    """Column → mean and standard error over the images, prompts × ``seeds``."""
    stats: dict[str, Stat] = {}
    for column, values in columns.items():
        every = zip(values.tolist(), [*seeds] * (len(values) // len(seeds)), strict=True)
        known = [(value, seed) for value, seed in every if not math.isnan(value)]
        if known:
            stats[column] = over_seeds([value for value, _ in known], [seed for _, seed in known])
    return stats
