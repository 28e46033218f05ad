"""What LoRA files say about themselves, in metadata and file names. Untrusted: they may contain any
text."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, Literal

from .phrases import cleaned, is_common

Purpose = Literal["speed", "edit"]
"""The purpose of a LoRA that is not a concept: it makes a base draw in few steps without guidance,
or edit images. It belongs on the base model."""

_BASES = re.compile(r"(z[-_ ]?image|sd|sdxl|sd3(\.5)?)[-_ ]?turbo|qwen[-_ ]?image[-_ ]?edit", re.I)
"""Bases with these words in their names, which their LoRAs' names repeat."""
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
_NAMED = ("ss_output_name", "modelspec.title")


def parse_object(text: str | None) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """A LoRA's trigger words, as its trainer recorded them, best first.

    ``modelspec.trigger_phrase``; the triggers in a merged file; the names of sd-scripts' dataset
    folders (``10_sks dog``); the tag in every caption (``ss_tag_frequency``). The last two are
    guesses, so common words and tags are left out.
    """
    words = _named(metadata)
    words += [str(concept.get("trigger") or "") for concept in merged_concepts(metadata)]
    for folder in parse_object(metadata.get("ss_dataset_dirs")):
        number, _, name = folder.partition("_")
        if number.isdigit() and not is_common(name):
            words.append(name.strip())
    words += _constant_tags(metadata)
    return list(dict.fromkeys(word for word in words if word))


def trigger_phrases(metadata: Mapping[str, str]) -> list[str]:
    """Phrases for a prompt: :func:`noted_phrases`, or the best word alone."""
    return noted_phrases(metadata) or trigger_words(metadata)[:1]


def noted_phrases(metadata: Mapping[str, str]) -> list[str]:
    """Every trigger phrase that the file itself names, as a merged file or
    ``modelspec.trigger_phrase`` does."""
    phrases: list[str] = []
    for concept in merged_concepts(metadata):
        called = concept.get("called") or concept.get("subjects")
        several = [str(phrase) for phrase in called] if isinstance(called, list) else []
        phrases += several or [f"{concept.get('trigger') or ''} {concept.get('class') or ''}"]
    phrases = phrases or _named(metadata)
    return list(dict.fromkeys(phrase.strip() for phrase in phrases if phrase.strip()))


def _named(metadata: Mapping[str, str]) -> list[str]:
    return [cleaned(part) for part in metadata.get("modelspec.trigger_phrase", "").split(",")]


def merged_concepts(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The concepts with a LoRA in a merged file."""
    concepts = parse_object(metadata.get("iteris")).get("concepts")
    concepts = concepts if isinstance(concepts, list) else []
    return [c for c in concepts if isinstance(c, dict) and c.get("lora") is not None]


def _constant_tags(metadata: Mapping[str, str]) -> list[str]:
    """Per dataset folder, the most frequent tag if no other tag is as frequent; common ones do not
    count."""
    constant: list[str] = []
    for tags in tag_frequency(metadata).values():
        own = {tag: count for tag, count in tags.items() if not is_common(tag)}
        common = Counter(own).most_common(2)
        if common and (len(common) == 1 or common[0][1] > common[1][1]):
            constant.append(common[0][0].strip())
    return constant


def tag_frequency(metadata: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """``ss_tag_frequency``: dataset folder → tag → count, without what is malformed."""
    tables: dict[str, dict[str, int]] = {}
    for folder, tags in parse_object(metadata.get("ss_tag_frequency")).items():
        if isinstance(tags, dict):
            counts = {str(t): n for t, n in tags.items() if type(n) is int and 0 <= n < 1 << 53}
            tables[folder] = counts
    return tables


def merge_tag_frequency(inputs: Sequence[Mapping[str, str]]) -> dict[str, dict[str, int]]:
    """The tables of all inputs combined; counts of equal tags in equal folders are added."""
    merged: dict[str, Counter[str]] = {}
    for metadata in inputs:
        for folder, tags in tag_frequency(metadata).items():
            merged.setdefault(folder, Counter()).update(tags)
    return {folder: dict(tags) for folder, tags in merged.items()}


_ON_THE_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def public_name(base: str) -> str:
    """``base`` as a file may name it: a hub name, or the last part of a path. A local folder is
    useless elsewhere, and reveals private paths."""
    path = Path(os.path.expanduser(base))  # unchanged if there is no such user
    if base and path.exists():
        return path.resolve().name
    return base if _ON_THE_HUB.fullmatch(base) else PureWindowsPath(base).name


def is_fast(names: Iterable[str]) -> str:
    """The first of ``names`` (models and LoRAs) that suggests that the base draws in few steps
    without guidance; empty if none does."""
    words = _WORDS["speed"]
    return next((name for name in names if words.search(_words(PurePath(name).stem))), "")


def purpose_of(name: str, metadata: Mapping[str, str]) -> Purpose | None:
    """The purpose of a LoRA that is not a concept, from its file's ``name`` and its metadata."""
    known = [name, *(metadata.get(key, "") for key in _NAMED)]
    texts = [_words(_BASES.sub(" ", text)) for text in known]
    for purpose, words in _WORDS.items():
        if any(words.search(text) for text in texts):
            return purpose
    return None


def _words(text: str) -> str:
    """Separate words by spaces, also at capitals or underscores."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[_.]", " ", text)
