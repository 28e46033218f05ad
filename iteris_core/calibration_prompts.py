"""The prompts on which features are collected: of a concept, of two, and of none.

A least squares fit holds a merge to what its rows show and to nothing else: a word that no row has
meets a change that was fitted to accidents. So some of a concept's rows have further words beside
its own (:class:`Wording`), and rows of their own have *generic* prompts, which name no concept, and
on which the base is to stay as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

import torch

from .concepts import KINDS, Calibration, Concept, prompt_list
from .errors import ConceptError

CAPTIONS = prompt_list("generic")
"""Things, places, people, light, cameras, art and tags, in a few languages."""

_MARKS = ("▁", "Ġ")
"""The marks of a vocabulary's pieces with which a word begins, as sentencepiece and byte-level
vocabularies write it; those of CLIP that end a word end with ``</w>``."""
_LEAST_LETTERS = 3
_KNOWN_SHARE = 0.75
_MARKED = ",.;:!?()\"'"
_LONG = 30  # words; a CLIP takes 75 tokens
_SHARE, _SHARE_OF_MANY, _MANY = 0.25, 0.5, 6
"""The share of contexts, and that from so many LoRAs on, or of a subject with a style:
docs/decisions.md, "How many contexts" and "A subject in a style"."""
_READ_ALIKE = 8
"""So many samples of a concept have rows that read the same prompt as it is."""


def concept_prompts(
    concept: Concept, calibration: Calibration, generator: torch.Generator
) -> list[str]:
    """``calibration.samples`` prompts, in random order, repeated evenly if there are fewer; of
    several phrases each in turn. Raises :class:`IterisError` where there are none."""
    pools = prompt_pools(concept, calibration)
    each = -(-calibration.samples // len(pools))
    columns = [in_random_order(pool, each, generator) for pool in pools]
    turns = zip(*columns, strict=True)
    return [prompt for turn in turns for prompt in turn][: calibration.samples]


def prompt_pools(concept: Concept, calibration: Calibration) -> list[list[str]]:
    """The concept's own prompts, or those of each of its phrases. Raises :class:`IterisError` where
    there are none."""
    if concept.prompts is not None:
        pools = [[str(prompt) for prompt in concept.prompts]]
        if not pools[0]:
            raise ConceptError(
                f"Concept {concept.name!r} has an empty prompt list; give prompts, or a trigger "
                "and a class word to make them from."
            )
    else:
        templates = _templates(concept, calibration)
        # Not by format: a phrase of tags may hold braces.
        pools = [[t.replace("{}", phrase) for t in templates] for phrase in concept.phrases]
    if not pools:
        raise ConceptError(
            f"LoRA {concept.name!r} has no trigger word and no prompts. Type its trigger word: in "
            "the node under words, in Python as Concept(trigger=…) or Concept(prompts=[…])."
        )
    return pools


def distinct_prompts(concept: Concept, calibration: Calibration) -> int:
    """The number of prompts of a concept; 0 where it has inputs instead."""
    if concept.prompts is not None:
        return len(set(map(str, concept.prompts)))
    return len(_templates(concept, calibration)) * len(concept.phrases)


def _templates(concept: Concept, calibration: Calibration) -> Sequence[str]:
    return calibration.single_templates if concept.kind == "subject" else KINDS[concept.kind]


def context_shares(concepts: Sequence[Concept], calibration: Calibration) -> list[float]:
    """The share of each concept's rows that carry further words, 0 of those without a LoRA. Where
    the calibration leaves it open, many LoRAs, subjects with a style, and few prompts have more."""
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
    """Prompts that show the two side by side, one for each template and each two phrases."""
    return [
        one.join([head, other.join([middle, tail])])
        for head, middle, tail in (t.split("{}") for t in calibration.pair_templates)
        for one in left.phrases
        for other in right.phrases
    ]


def in_random_order(pool: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """``count`` of the ``pool``, all of it before one comes again."""
    prompts: list[str] = []
    while len(prompts) < count:
        order: list[int] = torch.randperm(len(pool), generator=generator).tolist()
        prompts += [pool[index] for index in order]
    return prompts[:count]


def whole_words(pieces: Iterable[str]) -> list[str]:
    """The words of a tokenizer's vocabulary that are one token each, sorted: of letters alone, and
    at least three of them."""
    every = list(pieces)
    ends = any(piece.endswith("</w>") for piece in every)
    begins = any(piece.startswith(_MARKS) for piece in every)
    found: set[str] = set()
    for piece in every:
        if ends:
            word = piece.removesuffix("</w>") if piece.endswith("</w>") else ""
        elif begins:
            word = piece[1:] if piece.startswith(_MARKS) else ""
        else:  # as in BERT's, where "##" begins what is no beginning
            word = piece
        if len(word) >= _LEAST_LETTERS and word.isalpha():
            found.add(word.lower())
    return sorted(found)


class Wording:
    """Prompts of no concept, and contexts for those of one: captions of our own, and random words
    of the ``vocabulary`` of the host's text encoder (empty: captions alone), which knows most words
    of a caption. None holds a word that calls for one of the ``concepts``."""

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

    def in_context(self, prompt: str) -> str:
        """``prompt`` with further words behind it, before it, or both; a long one as it is, since
        text encoders cut what is too long for them."""
        if len(prompt.split()) > _LONG:
            return prompt
        place = self._number(4)
        before = f"{self._some(3)} " if place >= 2 else ""
        behind = f" {self._some(5 if place < 2 else 3)}" if place != 2 else ""
        return f"{before}{prompt}{behind}"

    def chosen(self, chances: Sequence[float]) -> list[bool]:
        """Choose at random, each with a chance of its own."""
        drawn = torch.rand(len(chances), generator=self.generator)
        return (drawn < torch.tensor(chances)).tolist()

    def _some(self, most: int) -> str:
        """A caption, or, three times in four, up to so many random words."""
        if not self._words or (self._captions and not self._number(4)):
            return self._captions[self._number(len(self._captions))]
        count = 1 + self._number(most)
        return " ".join(self._words[self._number(len(self._words))] for _ in range(count))

    def _number(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self.generator))


def calling_words(concepts: Iterable[Concept]) -> Set[str]:
    """The words that call for concepts that have a LoRA: those of their triggers; without a trigger
    those of its phrases, or those that all of its own prompts share."""
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
