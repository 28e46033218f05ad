"""Prompts of a comparison, and which of them judge each concept."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from ..concepts import Concept, prompt_list
from ..errors import ScoreError

PROMPT_LISTS: Mapping[str, tuple[str, ...]] = {
    name: prompt_list(name) for name in ("composition", "objects", "animals")
}
"""Our own lists, in the style of DreamBooth's (contexts, outfits, properties) and
CustomConcept101's (compositions), whose list is for research only."""


def each_expanded(templates: Sequence[str], count: int) -> list[str]:
    """A template with ``{each}`` becomes one template for each of ``count`` concepts, with ``{1}``,
    ``{2}`` and so on in place of ``{each}``."""
    expanded: list[str] = []
    for template in templates:
        numbers = range(1, count + 1) if "{each}" in template else [0]
        expanded += [template.replace("{each}", f"{{{number}}}") for number in numbers]
    return expanded


def fill_prompts(
    templates: Sequence[str],
    concepts: Sequence[Concept],
    say: Callable[[int, str], str] = lambda _, subject: subject,
) -> list[str]:
    """``{1}``, ``{2}`` … stand for the concepts, ``{all}`` for "sks1 cat and sks2 dog", ``{each}``
    makes one prompt per concept; ``say(concept, words)`` formats each concept's words."""
    subjects = [say(index, concept.subject) for index, concept in enumerate(concepts)]
    prompts: list[str] = []
    for template in each_expanded(templates, len(concepts)):
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


def judged_prompts(templates: Sequence[str], concepts: Sequence[Concept]) -> list[list[int]]:
    """For each concept, the prompts (indices into :func:`fill_prompts`) on which its likeness is
    measured: those that name it and no other concept or, if there are none, all that name it.

    An image of two concepts resembles the references of neither, however well it shows both. Raises
    :class:`IterisError` for a concept that no prompt names.
    """
    named = [_named(text, concepts) for text in each_expanded(templates, len(concepts))]
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


def _named(template: str, concepts: Sequence[Concept]) -> set[int]:
    """The concepts that a template names, by placeholder or by their own words."""
    return {
        index
        for index, concept in enumerate(concepts)
        if "{all}" in template
        or f"{{{index + 1}}}" in template
        or any(re.search(rf"(?<!\w){re.escape(p)}(?!\w)", template) for p in concept.phrases)
    }


def labels_of(concepts: Sequence[Concept]) -> list[str]:
    """The concepts' names for columns and rows; duplicates get a number."""
    names = [concept.name for concept in concepts]
    return [
        f"{name} ({index})" if names.count(name) > 1 else name
        for index, name in enumerate(names, 1)
    ]
