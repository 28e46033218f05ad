"""Rows of a subject in a style, on which the merged model should do what both LoRAs do together.

Rows of single concepts never show the two at once, so least squares serves each only on its own
prompts, and a prompt that names both loses the subject. A composite is an extra concept whose
target is the sum of its parts' changes, T = X (ΔW_subject + ΔW_style)ᵀ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product, takewhile

from .calibration_prompts import Wording, concept_prompts
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
    """One composite per subject and style, each with ``rows`` rows. If there are more pairs than
    LoRAs, they share the rows that one pair per LoRA would have. Half of the prompts get extra
    words.

    A style is invoked by its phrases, or by the words with which all of its own prompts end. A LoRA
    with embeddings takes no part: its words mean something only under that LoRA.
    """
    pairs = list(_pairs(concepts)) if calibration.composites else []
    loras = sum(concept.lora is not None for concept in concepts)
    each = min(rows, max(1, rows * loras // max(len(pairs), 1)))
    return [
        Composite(
            None,
            _prompts(subject, style, calibration, wording, each),
            trigger=f"{subject.name} in {style.name}",
            weight=calibration.composites,
            parts=(subject, style),
        )
        for subject, style in pairs
    ]


def _pairs(concepts: Sequence[Concept]) -> Iterator[tuple[Concept, Concept]]:
    fit = [c for c in concepts if c.lora is not None and not c.lora.embeddings and c.inputs is None]
    subjects = [c for c in fit if c.kind == "subject" and (c.prompts is not None or c.phrases)]
    styles = [concept for concept in fit if concept.kind == "style" and _words_of(concept)]
    yield from product(subjects, styles)


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
