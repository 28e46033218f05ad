"""LoRAs that are no concepts, by the words in their names: those that make a base draw in few steps
without guidance, and those that make it edit pictures. They belong on the base model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Literal

Purpose = Literal["speed", "edit"]

_BASES = re.compile(r"(z[-_ ]?image|sd|sdxl|sd3(\.5)?)[-_ ]?turbo|qwen[-_ ]?image[-_ ]?edit", re.I)
"""Bases with such words in their names, of which LoRAs have them too."""
_WORDS: Mapping[Purpose, re.Pattern[str]] = {
    "speed": re.compile(
        r"lightning|turbo|schnell|lightx2v|caus(al)?vid|distill|self[-_ ]?forcing"
        r"|\b(lcm|tcd|pcm|dmd2?|accvid(eo)?)\b|\bhyper[-_ ]?(sd|flux)"
        r"|\b(1|2|4|6|8|12|16)[-_ ]?steps?\b",
        re.I,
    ),
    "edit": re.compile(
        r"kontext|\bedit(ing|or)?\b|instruct[-_ ]?pix2pix|\bip2p\b|in[-_ ]?context", re.I
    ),
}
_NAMES = ("ss_output_name", "modelspec.title")


def is_fast(names: Iterable[str]) -> str:
    """The first of ``names`` of models and LoRAs that says that the base draws in few steps, which
    it does without guidance; empty if none does."""
    words = _WORDS["speed"]
    return next((name for name in names if words.search(_words(PurePath(name).stem))), "")


def purpose_of(name: str, metadata: Mapping[str, str]) -> Purpose | None:
    """The purpose of a LoRA that is no concept, from its file's ``name`` and its metadata."""
    known = [name, *(metadata.get(key, "") for key in _NAMES)]
    texts = [_words(_BASES.sub(" ", text)) for text in known]
    for purpose, words in _WORDS.items():
        if any(words.search(text) for text in texts):
            return purpose
    return None


def _words(text: str) -> str:
    """With blanks between the words, also where capitals or underscores part them."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[_.]", " ", text)
