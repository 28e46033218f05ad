"""Scores of one row of a comparison: on which prompts each concept is judged, a value per image,
and their means with standard errors over seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev

import torch
from PIL import Image
from torch import Tensor

from ..concepts import Concept, prompt_list
from ..errors import ScoreError
from . import ClipScorer, without_tokens

BASE, ALONE = "base", "alone"
"""Rows without a LoRA, and with each LoRA by itself."""
PROMPT_LISTS: Mapping[str, tuple[str, ...]] = {
    name: prompt_list(name) for name in ("composition", "objects", "animals")
}
"""Our own lists, in the style of DreamBooth's (contexts, outfits, properties) and
CustomConcept101's (compositions), whose list is for research only."""


def fill_prompts(
    templates: Sequence[str],
    concepts: Sequence[Concept],
    say: Callable[[int, str], str] = lambda _, subject: subject,
) -> list[str]:
    """``{1}``, ``{2}`` … stand for the concepts, ``{all}`` for "sks1 cat and sks2 dog", ``{each}``
    makes one prompt per concept; ``say(concept, words)`` formats each concept's words."""
    subjects = [say(index, concept.subject) for index, concept in enumerate(concepts)]
    prompts: list[str] = []
    for template in _each_expanded(templates, len(concepts)):
        prompt = template.replace("{all}", " and ".join(f"a {subject}" for subject in subjects))
        for index, subject in enumerate(subjects, 1):
            prompt = prompt.replace(f"{{{index}}}", subject)
        if "{" in prompt:
            raise ScoreError(
                f"Prompt {template!r} has a placeholder other than {{all}}, {{each}} or {{1}} to "
                f"{{{len(subjects)}}}."
            )
        prompts.append(prompt)
    if not prompts:
        raise ScoreError("There are no prompts to draw.")
    return prompts


def _each_expanded(templates: Sequence[str], count: int) -> list[str]:
    """``templates``, with those that contain ``{each}`` once for each of ``count`` concepts."""
    return [
        template.replace("{each}", f"{{{number}}}")
        for template in templates
        for number in (range(1, count + 1) if "{each}" in template else [0])
    ]


def judged_prompts(templates: Sequence[str], concepts: Sequence[Concept]) -> list[list[int]]:
    """For each concept, the prompts (indices into :func:`fill_prompts`) on which its likeness is
    measured: those that name it, by placeholder or by its own words, and no other concept or, if
    there are none, all that name it.

    An image of two concepts resembles the references of neither, however well it shows both. Raises
    :class:`IterisError` for a concept that no prompt names.
    """
    named = [
        {
            index
            for index, concept in enumerate(concepts)
            if "{all}" in template
            or f"{{{index + 1}}}" in template
            or any(re.search(rf"(?<!\w){re.escape(p)}(?!\w)", template) for p in concept.phrases)
        }
        for template in _each_expanded(templates, len(concepts))
    ]
    judged: list[list[int]] = []
    for index, concept in enumerate(concepts):
        naming = [number for number, indices in enumerate(named) if index in indices]
        if not naming:
            raise ScoreError(
                f"No prompt names concept {index + 1} ({concept.subject!r}), so its likeness "
                f"cannot be measured; add one with {{{index + 1}}}, {{each}} or {{all}}."
            )
        judged.append([number for number in naming if len(named[number]) == 1] or naming)
    return judged


@dataclass(frozen=True)
class Measure:
    """Scores of a row's images. Concept i has ``references[i]`` and prompts ``judged[i]``."""

    concepts: Sequence[Concept]
    references: Sequence[Sequence[Image.Image]]
    prompts: Sequence[str]
    judged: Sequence[Sequence[int]]
    scorer: ClipScorer

    @cached_property
    def labels(self) -> list[str]:
        """The concepts' names for columns and rows; duplicates get a number."""
        names = [concept.name for concept in self.concepts]
        numbered = enumerate(names, 1)
        return [f"{name} ({at})" if names.count(name) > 1 else name for at, name in numbered]

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
            others = torch.tensor([number not in self.judged[index] for number in numbers])
            values = (vectors @ self._embedded[index].mT).mean(dim=1)
            columns[f"image {self.labels[index]}"] = values.masked_fill(others, math.nan)
        likeness = torch.stack(list(columns.values()))
        tokens = [concept.trigger for concept in self.concepts if concept.trigger]
        plain = [without_tokens(prompt, tokens) for prompt in prompts]
        text = (vectors * self.scorer.embed_texts(plain)).sum(dim=1)
        columns["text"] = text
        columns["text, tokens kept"] = (vectors * self.scorer.embed_texts(prompts)).sum(dim=1)
        columns["mean"] = (likeness.nanmean(dim=0) + text) / 2
        return columns


def add_shares(columns: Mapping[str, dict[str, Tensor]], labels: Sequence[str]) -> None:
    """Add each row's share of each concept's likeness under its LoRA alone, on the same prompts.
    Nothing is added until every LoRA has been drawn alone; a likeness of 0 or less gets no
    share."""
    if any(f"{ALONE} {label}" not in columns for label in labels):
        return
    alone = {
        label: float(columns[f"{ALONE} {label}"][f"image {label}"].nanmean()) for label in labels
    }
    known = {label: most for label, most in alone.items() if most > 0}
    for row, values in columns.items():
        if known and not row.startswith(f"{ALONE} "):
            shares = [values[f"image {label}"] / most for label, most in known.items()]
            values["share"] = torch.stack(shares).nanmean(dim=0)


@dataclass(frozen=True)
class Stat:
    """A mean and its standard error; ``se`` is NaN for a single seed."""

    mean: float
    se: float

    def to_dict(self) -> dict[str, float | None]:
        return {"mean": self.mean, "se": None if math.isnan(self.se) else self.se}

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isnan(self.se) else f"{self.mean:.4f} ± {self.se:.4f}"


Rows = Mapping[str, Mapping[str, Stat]]
"""Method → column → value"""


def stats_of(columns: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Stat]:
    """Column → mean and standard error over the images, prompts × ``seeds``."""
    stats: dict[str, Stat] = {}
    for column, values in columns.items():
        every = zip(values.tolist(), [*seeds] * (len(values) // len(seeds)), strict=True)
        known = [(value, seed) for value, seed in every if not math.isnan(value)]
        if known:
            stats[column] = over_seeds([value for value, _ in known], [seed for _, seed in known])
    return stats


def over_seeds(values: Sequence[float], seeds: Sequence[int]) -> Stat:
    """The mean of the seeds' means, and the standard error of that mean.

    Images with the same seed share their noise, so seeds are independent, but images are not.
    """
    groups: dict[int, list[float]] = {}
    for value, seed in zip(values, seeds, strict=True):
        groups.setdefault(seed, []).append(value)
    means = [fmean(group) for group in groups.values()]
    error = stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Stat(fmean(means), error)


def markdown_table(rows: Rows) -> str:
    """A table with four digits; missing values stay empty."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["method", *columns], ["---", *("---:" for _ in columns)]]
    lines += [
        [name, *(str(row.get(column, "")) for column in columns)] for name, row in rows.items()
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
