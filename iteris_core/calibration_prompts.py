"""Prompts on which features are collected: for one concept, for two, and for none.

A least squares fit constrains a merge only on what its rows show: a word that no row contains meets
a change fitted to accidents. Some of a concept's rows therefore get extra words (:class:`Wording`).
Separate rows have *generic* prompts, which name no concept; on them the base should not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import TypeVar

import torch

from .concepts import KINDS, Calibration, Concept, prompt_list
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
    """The number of a concept's samples: the calibration's, but at least one for every phrase."""
    return max(calibration.samples, turns_of(concept))


def prompt_pools(concept: Concept, calibration: Calibration) -> list[list[str]]:
    """The concept's own prompts, or one list per phrase made from templates. Raises
    :class:`IterisError` if there are none."""
    if concept.prompts is not None:
        pools = [[str(prompt) for prompt in concept.prompts]]
        if not pools[0]:
            raise ConceptError(
                f"Concept {concept.name!r} has an empty prompt list; give prompts, or a trigger "
                "and a class word from which to make them."
            )
    else:
        templates = templates_of(concept, calibration)
        # No str.format: a phrase of tags may contain braces.
        pools = [[t.replace("{}", phrase) for t in templates] for phrase in concept.phrases]
    if not pools:
        raise ConceptError(
            f"LoRA {concept.name!r} has no trigger word and no prompts. Type its trigger word: in "
            "the node under words, in Python as Concept(trigger=…). A style, slider or detailer "
            "that acts on every prompt has none: make it always on, in Python always_on='include'. "
            "Prompts of its own (Concept(prompts=[…])) are for a LoRA that only these invoke."
        )
    return pools


def distinct_prompts(concept: Concept, calibration: Calibration) -> int:
    """Number of different prompts of a concept; 0 if it has inputs instead."""
    if concept.prompts is not None:
        return len(set(map(str, concept.prompts)))
    return len(templates_of(concept, calibration)) * len(concept.phrases)


def templates_of(concept: Concept, calibration: Calibration) -> Sequence[str]:
    return calibration.single_templates if concept.kind == "subject" else KINDS[concept.kind]


def context_shares(concepts: Sequence[Concept], calibration: Calibration) -> list[float]:
    """Share of each concept's rows that get extra words; 0 for concepts without a LoRA. If the
    calibration leaves it open, it is higher for many LoRAs, subjects with a style, and few
    prompts."""
    kinds = [concept.kind for concept in concepts if concept.lora is not None]
    many = len(kinds) >= _MANY or {"subject", "style"} <= set(kinds)
    least = _SHARE_OF_MANY if many else _SHARE

    def share(concept: Concept) -> float:
        distinct = distinct_prompts(concept, calibration)
        if concept.lora is None or not distinct:
            return 0.0
        if calibration.contexts is not None:
            return calibration.contexts
        return max(least, 1 - _READ_ALIKE * distinct / calibration.samples)

    return [share(concept) for concept in concepts]


def pair_prompts(left: Concept, right: Concept, calibration: Calibration) -> list[str]:
    """Prompts that show the two side by side, one per template and pair of phrases."""
    return [
        one.join([head, other.join([middle, tail])])
        for head, middle, tail in (t.split("{}") for t in calibration.pair_templates)
        for one in left.phrases
        for other in right.phrases
    ]


def in_random_order(pool: Sequence[_T], count: int, generator: torch.Generator) -> list[_T]:
    """``count`` items of ``pool`` in random order; each occurs once before any repeats."""
    items: list[_T] = []
    while len(items) < count:
        order: list[int] = torch.randperm(len(pool), generator=generator).tolist()
        items += [pool[index] for index in order]
    return items[:count]


def whole_words(pieces: Iterable[str]) -> list[str]:
    """The words that are a single token in a tokenizer's vocabulary, sorted: only letters, at least
    three of them."""
    every = list(pieces)
    ends = any(piece.endswith("</w>") for piece in every)
    begins = any(piece.startswith(_MARKS) for piece in every)
    found: set[str] = set()
    for piece in every:
        if ends:
            word = piece.removesuffix("</w>") if piece.endswith("</w>") else ""
        elif begins:
            word = piece[1:] if piece.startswith(_MARKS) else ""
        else:  # as in BERT's, where "##" marks a continuation
            word = piece
        if len(word) >= _LEAST_LETTERS and word.isalpha():
            found.add(word.lower())
    return sorted(found)


class Wording:
    """Makes generic prompts, and contexts for a concept's prompts, from built-in captions and
    random words of the ``vocabulary`` of the host's text encoder (empty: captions only). A caption
    is used only if the encoder knows most of its words. None contains a word that invokes one of
    the ``concepts``."""

    def __init__(
        self, vocabulary: Sequence[str], concepts: Iterable[Concept], generator: torch.Generator
    ) -> None:
        avoided, known = calling_words(concepts), set(vocabulary)
        self.generator = generator
        self._words = [word for word in vocabulary if word not in avoided]
        self._captions = [
            caption
            for caption in CAPTIONS
            if not _words(caption) & avoided and (not known or _is_known(caption, known))
        ]

    def generic(self, count: int) -> list[str]:
        """``count`` prompts that name no concept."""
        return [self._some(8) for _ in range(count)]

    def word(self) -> str:
        """A word of the vocabulary; empty if there is none."""
        return self._words[self._number(len(self._words))] if self._words else ""

    def in_context(self, prompt: str) -> str:
        """``prompt`` with extra words after it, before it, or both. A long prompt stays as it is,
        because text encoders truncate."""
        if len(prompt.split()) > _LONG:
            return prompt
        place = self._number(4)
        before = f"{self._some(3)} " if place >= 2 else ""
        behind = f" {self._some(5 if place < 2 else 3)}" if place != 2 else ""
        return f"{before}{prompt}{behind}"

    def chosen(self, chances: Sequence[float]) -> list[bool]:
        """Choose items at random, each with its own probability."""
        drawn = torch.rand(len(chances), generator=self.generator)
        return (drawn < torch.tensor(chances)).tolist()

    def _some(self, most: int) -> str:
        """A caption, or, three times out of four, up to that many random words."""
        if not self._words or (self._captions and not self._number(4)):
            return self._captions[self._number(len(self._captions))]
        count = 1 + self._number(most)
        return " ".join(self._words[self._number(len(self._words))] for _ in range(count))

    def _number(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self.generator))


def calling_words(concepts: Iterable[Concept]) -> Set[str]:
    """Words that invoke the concepts with a LoRA: those of the trigger; without a trigger, those of
    the phrases, or those that all of the concept's own prompts share."""
    found: set[str] = set()
    for concept in concepts:
        if concept.lora is None:
            continue
        if concept.trigger:
            found |= _words(concept.trigger)
        elif concept.phrases:
            found |= set[str]().union(*map(_words, concept.phrases))
        elif concept.prompts:
            found |= set.intersection(*(_words(str(prompt)) for prompt in concept.prompts))
    return found


def _is_known(caption: str, vocabulary: Set[str]) -> bool:
    words = [word for word in _words(caption) if len(word) >= _LEAST_LETTERS]
    return sum(word in vocabulary for word in words) >= _KNOWN_SHARE * len(words)


def _words(text: str) -> set[str]:
    return {stripped for word in text.lower().split() if (stripped := word.strip(_MARKED))}
