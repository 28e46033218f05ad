"""CIDEr-D of captions (Vedantam, Zitnick and Parikh, CVPR 2015), words split at spaces.

Document frequencies are from the references themselves; times 10.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Ngram = tuple[str, ...]
_SIGMA = 6.0  # of the length penalty of CIDEr-D


def ngrams(text: str, n: int) -> Counter[Ngram]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean CIDEr-D over the candidates."""
    documents: Counter[Ngram] = Counter()
    for some in references:
        for n in range(1, 5):
            documents.update(set().union(*(ngrams(reference, n) for reference in some)))
    corpus = math.log(len(references))

    def weigh(text: str, n: int) -> dict[Ngram, float]:
        return {
            gram: count * (corpus - math.log(max(1, documents[gram])))
            for gram, count in ngrams(text, n).items()
        }

    total = 0.0
    for candidate, some in zip(candidates, references, strict=True):
        for reference in some:
            gap = len(candidate.split()) - len(reference.split())
            penalty = math.exp(-(gap**2) / (2 * _SIGMA**2))
            alike = sum(
                _clipped_cosine(weigh(candidate, n), weigh(reference, n)) for n in (1, 2, 3, 4)
            )
            total += penalty * alike / 4 / len(some)
    return 10 * total / len(candidates)


def _clipped_cosine(found: dict[Ngram, float], wanted: dict[Ngram, float]) -> float:
    """The candidate's weights count no more than the reference's."""
    norms = math.hypot(*found.values()) * math.hypot(*wanted.values())
    if not norms:
        return 0.0
    shared = (
        min(weight, wanted[gram]) * wanted[gram] for gram, weight in found.items() if gram in wanted
    )
    return sum(shared) / norms
