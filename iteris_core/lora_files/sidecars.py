"""Trigger words beside a LoRA file, where download helpers note them: Lora-Manager's
``.metadata.json``, Civitai Helper's ``.civitai.info``, rgthree's ``.rgthree-info.json``. Read
without trusting them: any text may stand there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .metadata import noted_phrases, trigger_words

_ENDINGS = (".metadata.json", ".civitai.info", ".rgthree-info.json")
_NAMES = ("trainedWords", "trigger_words")


class FoundPhrases(NamedTuple):
    """Phrases that call for what a LoRA knows, and where they stand: ``"file"``, the ending of a
    sidecar, ``"captions"`` for what its trainer's notes let guess, or empty."""

    phrases: tuple[str, ...] = ()
    source: str = ""


def find_phrases(file: Path, metadata: Mapping[str, str]) -> FoundPhrases:
    """The phrases that call for the LoRA in ``file``: those its ``metadata`` name outright, else
    what stands beside it, else the best guess from its captions."""
    if noted := noted_phrases(metadata):
        return FoundPhrases(tuple(noted), "file")
    beside = sidecar_phrases(file)
    if beside.phrases:
        return beside
    guessed = trigger_words(metadata)[:1]
    return FoundPhrases(tuple(guessed), "captions" if guessed else "")


def sidecar_phrases(file: Path) -> FoundPhrases:
    """The trigger words in the first file beside ``file`` that has any."""
    for path in sidecars(file):
        if phrases := _phrases(path):
            return FoundPhrases(tuple(phrases), _ending(path))
    return FoundPhrases()


def sidecars(file: Path) -> list[Path]:
    """The files beside ``file`` in which words may stand, named after it with or without its own
    ending."""
    paths = [file.with_name(f"{base}{end}") for end in _ENDINGS for base in (file.stem, file.name)]
    return [path for path in paths if path.is_file()]


def _ending(path: Path) -> str:
    return next(end for end in _ENDINGS if path.name.endswith(end))


def _phrases(path: Path) -> list[str]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    tables = [content, content.get("civitai")] if isinstance(content, dict) else []
    lists = [table.get(name) for table in tables if isinstance(table, dict) for name in _NAMES]
    words = [word for some in lists if isinstance(some, list) for word in some]
    texts = [word.get("word") if isinstance(word, dict) else word for word in words]
    phrases = [text.strip(" ,\n") for text in texts if isinstance(text, str)]
    return list(dict.fromkeys(phrase for phrase in phrases if phrase))
