"""Which words of a phrase can invoke a LoRA. Common words and booru tags cannot: the base model
knows them already, and captions of other LoRAs contain them too."""

from __future__ import annotations

import re
from itertools import dropwhile
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "prompts"
_WORDS = frozenset((_FOLDER / "common_words.txt").read_text(encoding="utf-8").split())
_TAGS = frozenset(re.split(r", |\n", (_FOLDER / "common_tags.txt").read_text(encoding="utf-8")))
_COUNT = re.compile(r"\d+\+?(girl|boy|other)s?")
_LOOKS = (" hair", " eyes", " background", " breasts", " quality")
_LORA = re.compile(r"<(lora|lyco|hypernet):[^>]*>", re.I)
_LEADING = re.compile(r"^\s*((a|an|the|(photo|photograph|picture|image) of)\s+)*(?=\S)", re.I)


def cleaned(phrase: str) -> str:
    """``phrase`` without ``<lora:…>`` and without common tags at its start; may be empty."""
    parts = filter(None, (part.strip() for part in _LORA.sub(" ", phrase).split(",")))
    return ", ".join(dropwhile(_is_tag, parts))


def is_common(phrase: str) -> bool:
    """True if ``phrase`` is a common tag, or all its words are common: it then invokes no LoRA."""
    return _is_tag(phrase) or all(map(_is_common, phrase.split()))


def bare(phrase: str) -> str:
    """``phrase`` without leading articles and "photo of", which the templates have."""
    return _LEADING.sub("", phrase).strip()


def parted(phrase: str) -> tuple[str, str, str]:
    """The words before the first one that is not common, that word, and those after it; all of them
    before it if there is none."""
    words = phrase.split()
    at = next((n for n, word in enumerate(words) if not _is_common(word)), len(words))
    before, word, after = map(" ".join, (words[:at], words[at : at + 1], words[at + 1 :]))
    return before, word, after


def _is_tag(phrase: str) -> bool:
    tag = phrase.strip().lower()
    if _COUNT.fullmatch(tag) or tag in _TAGS or tag.replace("_", " ") in _TAGS:
        return True
    return tag.replace("_", " ").endswith(_LOOKS) and all(map(_is_common, tag.split()))


def _is_common(word: str) -> bool:
    word = word.lower().strip(".,;:!?()\"'").removesuffix("'s")
    if _COUNT.fullmatch(word) or word in _TAGS:
        return True
    parts = filter(None, re.split(r"[-_'/]", word))
    return all(part.isdigit() or {part, part.removesuffix("s")} & _WORDS for part in parts)
