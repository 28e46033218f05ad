"""Sets of concepts by their class words: of several classes, and of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .plan import Plan
from .world import World


class SeveralClasses(Plan):
    """Sets whose concepts are of as many classes as there are."""

    def sets(self, size: int, replicate: int) -> list[tuple[str, ...]]:
        of = class_words(self.world)
        order = np.random.default_rng(replicate).permutation(len(self.world.subjects))
        subjects = [self.world.subjects[i] for i in order]
        count = self.per_size or max(2, len(subjects) // size)
        starts = [i * len(subjects) // count for i in range(count)]
        return [tuple(_spread(subjects[at:] + subjects[:at], of)[:size]) for at in starts]


class OneClass(Plan):
    """Sets of one class each, of those that have as many concepts."""

    def sets(self, size: int, replicate: int) -> list[tuple[str, ...]]:
        rng, of = np.random.default_rng(replicate), class_words(self.world)
        found = list[tuple[str, ...]]()
        for word in rng.permutation(sorted(set(of.values()))):
            members = [name for name in self.world.subjects if of[name] == word]
            found.append(tuple(members[i] for i in rng.permutation(len(members))[:size]))
        return [names for names in found if len(names) == size][: self.per_size]


def class_words(world: World) -> dict[str, str]:
    """Concept → its class word, "bird"."""
    concepts = world.concepts(world.subjects, 0)
    return {n: c.class_word or "" for n, c in zip(world.subjects, concepts, strict=True)}


def _spread(subjects: Sequence[str], of: dict[str, str]) -> list[str]:
    """The first of each class, then the second of each, and so on."""

    def rounds() -> Iterator[str]:
        left = list(subjects)
        while left:
            first = {of[name]: name for name in reversed(left)}
            chosen = [name for name in left if first[of[name]] == name]
            left = [name for name in left if name not in chosen]
            yield from chosen

    return list(rounds())
