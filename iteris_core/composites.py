"""Rows of a subject in a style, on which the merged model should do what both LoRAs do together.

Rows of single concepts never show the two at once, so least squares serves each only on its own
prompts, and a prompt that names both loses the subject. A composite is an extra concept whose
target is the sum of its parts' changes, T = X (ΔW_subject + ΔW_style)ᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import lcm

from .calibration_prompts import Wording, concept_prompts, in_random_order
from .concepts import Calibration, Concept


@dataclass(frozen=True)
class Composite(Concept):
    """Prompts that name all of its ``parts``, which are concepts of the same merge. It has no LoRA
    of its own: the parts' LoRAs act together, at their strengths."""

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
    return [
        Composite(
            None,
            _prompts(subject, style, calibration, wording, rows),
            trigger=f"{subject.name} in {style.name}",
            weight=weight,
            parts=(subject, style),
        )
        for subject, style in pairs
    ]


def _pairs(
    subjects: Sequence[Concept], styles: Sequence[Concept], wording: Wording
) -> list[tuple[Concept, Concept]]:
    """Different pairs in which every subject, and every style, occurs about equally often."""
    every, most = len(subjects) * len(styles), len(subjects) + len(styles)
    if every > most:
        subjects, styles = (
            in_random_order(some, len(some), wording.generator) for some in (subjects, styles)
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
    ending = [some[0] for some in takewhile(lambda some: len(set(some)) == 1, backwards)]
    return [" ".join(reversed(ending))] if ending else []


def _prompts(
    subject: Concept, style: Concept, calibration: Calibration, wording: Wording, count: int
) -> list[str]:
    """The subject's prompts followed by the style's words, with and without a comma."""
    plain = concept_prompts(subject, calibration, wording.generator)
    words = _words_of(style)
    found: list[str] = []
    for number in range(count):
        join = (", ", " ")[number % 2]
        prompt = join.join((plain[number % len(plain)], words[number % len(words)]))
        found.append(wording.in_context(prompt) if number % 4 > 1 else prompt)
    return found
