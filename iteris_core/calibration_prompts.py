"""Prompts on which features are collected: for one concept, for two, for a subject in a style, and
for none.

A least squares fit constrains a merge only on what its rows show: a word that no row contains meets
a change fitted to accidents. Some of a concept's rows therefore get extra words (:class:`Wording`).
Separate rows have *generic* prompts, which name no concept; on them the base should not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import takewhile
from math import lcm
from typing import TypeVar
from zlib import crc32

import torch

from .calibration import Calibration, prompt_list
from .concepts import KINDS, Concept
from .errors import ConceptError

_T = TypeVar("_T")

CAPTIONS = prompt_list("generic")
"""Things, places, people, light, cameras, art and tags, in a few languages."""

_MARKS = ("▁", "Ġ")
"""Marks at the start of a word in sentencepiece and byte-level vocabularies. In CLIP's, pieces that
end a word end with ``</w>`` instead."""
_LEAST_LETTERS = 3
_KNOWN_SHARE = 0.75
_MARKED = ",.;:!?()\"'"
_LONG = 30  # words; a CLIP takes 75 tokens
_SHARE, _SHARE_OF_MANY, _MANY = 0.25, 0.5, 6
"""Share of contexts; the share for many LoRAs or for a subject with a style; how many are many. See
docs/decisions.md, "How many contexts" and "A subject in a style"."""
_READ_ALIKE = 8
"""At most about this many samples per distinct prompt read it unchanged."""


def concept_prompts(
    concept: Concept, calibration: Calibration, generator: torch.Generator
) -> list[str]:
    """:func:`samples_of` prompts in random order, repeated evenly if there are fewer. Several
    phrases take turns. Raises :class:`IterisError` if the concept has none."""
    pools = prompt_pools(concept, calibration)
    count = samples_of(concept, calibration)
    columns = [in_random_order(pool, -(-count // len(pools)), generator) for pool in pools]
    turns = zip(*columns, strict=True)
    return [prompt for turn in turns for prompt in turn][:count]


def turns_of(concept: Concept) -> int:
    """The number of phrases that take turns in :func:`concept_prompts`."""
    return 1 if concept.prompts is not None else max(1, len(concept.phrases))


def samples_of(concept: Concept, calibration: Calibration) -> int:
    """The calibration's number, but at least one for every phrase."""
    return max(calibration.samples, turns_of(concept))


def prompt_pools(concept: Concept, calibration: Calibration) -> list[list[str]]:
    """The concept's own prompts, or one list per phrase, from templates; never none."""
    if concept.prompts:
        return [[str(prompt) for prompt in concept.prompts]]
    if concept.prompts is not None:
        raise ConceptError(
            f"Concept {concept.name!r} has an empty prompt list; give prompts, or a trigger and a "
            "class word from which to make them."
        )
    if not concept.phrases:
        raise ConceptError(
            f"LoRA {concept.name!r} has no trigger word and no prompts. Type its trigger word: in "
            "the node under words, in Python as Concept(trigger=…). A style, slider or detailer "
            "that acts on every prompt has none: make it always on, in Python always_on='include'. "
            "Prompts of its own (Concept(prompts=[…])) are for a LoRA that only these invoke."
        )
    templates = templates_of(concept, calibration)
    # No str.format: a phrase of tags may contain braces.
    return [[t.replace("{}", phrase) for t in templates] for phrase in concept.phrases]


def templates_of(concept: Concept, calibration: Calibration) -> Sequence[str]:
    return calibration.templates if concept.kind == "subject" else KINDS[concept.kind]


def context_shares(concepts: Sequence[Concept], calibration: Calibration) -> list[float]:
    """Share of each concept's rows that get extra words; 0 for concepts without a LoRA. If the
    calibration leaves it open, it is higher for many LoRAs, subjects with a style, and few
    prompts."""
    kinds = [concept.kind for concept in concepts if concept.lora is not None]
    many = len(kinds) >= _MANY or {"subject", "style"} <= set(kinds)
    least = _SHARE_OF_MANY if many else _SHARE

    def share(concept: Concept) -> float:
        if concept.prompts is not None:
            distinct = len(set(map(str, concept.prompts)))
        else:
            distinct = len(templates_of(concept, calibration)) * len(concept.phrases)
        if concept.lora is None or not distinct:  # without prompts it has inputs
            return 0.0
        if calibration.contexts is not None:
            return calibration.contexts
        return max(least, 1 - _READ_ALIKE * distinct / calibration.samples)

    return [share(concept) for concept in concepts]


def in_random_order(pool: Sequence[_T], count: int, generator: torch.Generator) -> list[_T]:
    """``count`` items of ``pool`` in random order; each occurs once before any repeats."""
    items: list[_T] = []
    while len(items) < count:
        order: list[int] = torch.randperm(len(pool), generator=generator).tolist()
        items += [pool[index] for index in order]
    return items[:count]


def whole_words(pieces: Iterable[str]) -> list[str]:
    """A tokenizer's words that are a single token of at least three letters, sorted."""
    words = list(pieces)  # as they are in BERT's, where "##" marks a continuation
    if ends := [piece[:-4] for piece in words if piece.endswith("</w>")]:
        words = ends
    elif begins := [piece[1:] for piece in words if piece.startswith(_MARKS)]:
        words = begins
    return sorted({w.lower() for w in words if len(w) >= _LEAST_LETTERS and w.isalpha()})


def is_held_out(word: str) -> bool:
    """True for a tenth of all words, always the same ones."""
    return not crc32(word.encode(), 7) % 10


class Wording:
    """Makes generic prompts, and contexts for a concept's prompts, from built-in captions of which
    the host's text encoder knows most words, and random words of its ``vocabulary``. None invokes
    one of the ``concepts``. Rows of a fit lack a tenth of the words, of which alone rows that
    measure it are made (``held_out``)."""

    def __init__(
        self,
        vocabulary: Sequence[str],
        concepts: Iterable[Concept],
        generator: torch.Generator,
        *,
        held_out: bool = False,
    ) -> None:
        avoided, known = calling_words(concepts), set(vocabulary)
        self.generator = generator
        words = [word for word in vocabulary if is_held_out(word) is held_out] or vocabulary
        self._words = [word for word in words if word not in avoided]
        self._captions: list[str] = []
        for caption in () if held_out and self._words else CAPTIONS:
            said = [word for word in _words(caption) if len(word) >= _LEAST_LETTERS]
            enough = sum(word in known for word in said) >= _KNOWN_SHARE * len(said)
            fits = enough and not any(map(is_held_out, said))
            if not _words(caption) & avoided and (fits or not known):
                self._captions.append(caption)

    def generic(self, count: int) -> list[str]:
        """``count`` prompts that name no concept."""
        return [self._some(8) for _ in range(count)]

    def word(self) -> str:
        """A word of the vocabulary; empty if there is none."""
        return self._words[self._number(len(self._words))] if self._words else ""

    def in_context(self, prompt: str) -> str:
        """``prompt``, unless it is long, with extra words after it, before it, or both."""
        if len(prompt.split()) > _LONG:
            return prompt
        place = self._number(4)
        before = f"{self._some(3)} " if place >= 2 else ""
        behind = f" {self._some(5 if place < 2 else 3)}" if place != 2 else ""
        return f"{before}{prompt}{behind}"

    def _some(self, most: int) -> str:
        """A caption, or, three times out of four, up to that many random words."""
        if not self._words or (self._captions and not self._number(4)):
            return self._captions[self._number(len(self._captions))]
        count = 1 + self._number(most)
        return " ".join(self._words[self._number(len(self._words))] for _ in range(count))

    def _number(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self.generator))


@dataclass(frozen=True)
class Composite(Concept):
    """Prompts that name all of its ``parts``, which are concepts of the same merge: a subject in a
    style. It has no LoRA of its own; the parts' LoRAs act together, at their strengths.

    Rows of single concepts never show the two at once, so least squares serves each only on its own
    prompts. The target here is the sum of the changes, T = X (ΔW_subject + ΔW_style)ᵀ.
    """

    parts: Sequence[Concept] = ()

    def has(self, concept: Concept) -> bool:
        return any(concept is part for part in self.parts)


def composites_of(
    concepts: Sequence[Concept], calibration: Calibration, wording: Wording, rows: int
) -> list[Composite]:
    """One composite per subject and style, each with ``rows`` rows. There are no more than subjects
    and styles; the seed then chooses among the pairs, and every subject and style is in one. Each
    subject, or each style if there are more styles, brings the calibration's weight, which all
    composites share. Half of the prompts get extra words.

    A style is invoked by its phrases, or by the words with which all of its own prompts end. A LoRA
    with embeddings takes no part: its words mean something only under that LoRA.
    """
    fit = [c for c in concepts if c.lora is not None and not c.lora.embeddings and c.inputs is None]
    subjects = [c for c in fit if c.kind == "subject" and (c.prompts is not None or c.phrases)]
    styles = [concept for concept in fit if concept.kind == "style" and _words_of(concept)]
    if not calibration.composites or not subjects or not styles:
        return []
    pairs = _pairs(subjects, styles, wording)
    weight = calibration.composites * (max(len(subjects), len(styles)) / len(pairs))
    composites: list[Composite] = []
    for subject, style in pairs:
        plain, words = concept_prompts(subject, calibration, wording.generator), _words_of(style)
        prompts: list[str] = []
        for number in range(rows):  # the style's words follow, with and without a comma
            join = (", ", " ")[number % 2]
            prompt = join.join((plain[number % len(plain)], words[number % len(words)]))
            prompts.append(wording.in_context(prompt) if number % 4 > 1 else prompt)
        name = f"{subject.name} in {style.name}"
        composites.append(
            Composite(None, prompts, trigger=name, weight=weight, parts=(subject, style))
        )
    return composites


def _pairs(
    subjects: Sequence[Concept], styles: Sequence[Concept], wording: Wording
) -> list[tuple[Concept, Concept]]:
    """Different pairs in which every subject, and every style, occurs about equally often."""
    every, most = len(subjects) * len(styles), len(subjects) + len(styles)
    if every > most:
        subjects, styles = (
            in_random_order(group, len(group), wording.generator) for group in (subjects, styles)
        )
    turn = lcm(len(subjects), len(styles))  # then both begin again, one of them a step further
    return [
        (subjects[n % len(subjects)], styles[(n + n // turn) % len(styles)])
        for n in range(min(every, most))
    ]


def _words_of(style: Concept) -> Sequence[str]:
    if style.phrases:
        return style.phrases
    backwards = zip(*(str(prompt).split()[::-1] for prompt in style.prompts or ()), strict=False)
    ending = [words[0] for words in takewhile(lambda words: len(set(words)) == 1, backwards)]
    return [" ".join(reversed(ending))] if ending else []


def calling_words(concepts: Iterable[Concept]) -> Set[str]:
    """Words that invoke the concepts with a LoRA: those of the trigger; without a trigger, those of
    the phrases, or those that all of the concept's own prompts share."""
    words: set[str] = set()
    for concept in concepts:
        if concept.lora is None:
            continue
        if concept.trigger:
            words |= _words(concept.trigger)
        elif concept.phrases:
            words |= set[str]().union(*map(_words, concept.phrases))
        elif concept.prompts:
            words |= set.intersection(*(_words(str(prompt)) for prompt in concept.prompts))
    return words


def _words(text: str) -> set[str]:
    return {stripped for word in text.lower().split() if (stripped := word.strip(_MARKED))}
