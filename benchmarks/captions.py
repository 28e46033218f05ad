"""Words of captions, in any world."""

from __future__ import annotations

import re


def words_of(text: str) -> set[str]:
    """Its words in lower case, of compounds each part."""
    return set(re.findall("[a-z]+", text.lower()))


def with_article(words: str) -> str:
    """The words with "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
