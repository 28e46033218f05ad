"""Files beside a LoRA in which LoRA browsers and download helpers keep its trigger words:
Lora-Manager's ``.metadata.json``, Civitai Helper's ``.civitai.info``, rgthree's
``.rgthree-info.json``, and the ``.json`` of Automatic1111's user interface. They are untrusted and
may contain any text. Lora-Manager's is also written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..saving import atomically
from .metadata import noted_phrases, trigger_words
from .phrases import cleaned
from .tensors import file_digest

_PREVIEWS = tuple(f".preview.{kind}" for kind in ("png", "jpg", "jpeg", "webp"))
_BASES = {"sd_v1": "SD 1.5", "sd_v2": "SD 2.1", "sdxl_base_v1-0": "SDXL 1.0", "flux1": "Flux.1 D"}
"""``ss_base_model_version`` → Lora-Manager's name for that base."""

_ENDINGS = (".metadata.json", ".civitai.info", ".rgthree-info.json", ".json")
_NAMES = ("trainedWords", "trigger_words")


class FoundPhrases(NamedTuple):
    """A LoRA's trigger phrases, and their source: ``"file"``, a sidecar's extension, ``"captions"``
    for a guess from the trainer's notes, or empty."""

    phrases: tuple[str, ...] = ()
    source: str = ""


def find_phrases(file: Path, metadata: Mapping[str, str]) -> FoundPhrases:
    """The trigger phrases of the LoRA in ``file``: those its ``metadata`` name explicitly,
    otherwise from files beside it, otherwise the best guess from its captions."""
    if noted := noted_phrases(metadata):
        return FoundPhrases(tuple(noted), "file")
    beside = sidecar_phrases(file)
    if beside.phrases:
        return beside
    guessed = trigger_words(metadata)[:1]
    return FoundPhrases(tuple(guessed), "captions" if guessed else "")


def sidecar_phrases(file: Path) -> FoundPhrases:
    """The trigger words from the first file beside ``file`` that has any."""
    for path in sidecars(file):
        if phrases := _phrases(path):
            ending = next(end for end in _ENDINGS if path.name.endswith(end))
            return FoundPhrases(tuple(phrases), ending)
    return FoundPhrases()


def sidecars(file: Path) -> list[Path]:
    """The files beside ``file`` that may contain words, named after it with or without its
    extension."""
    paths = [file.with_name(f"{base}{end}") for end in _ENDINGS for base in (file.stem, file.name)]
    return [path for path in paths if path.is_file()]


def previews(file: Path) -> list[Path]:
    """The images beside ``file`` that LoRA browsers show for it."""
    paths = [file.with_name(f"{file.stem}{end}") for end in _PREVIEWS]
    return [path for path in paths if path.is_file()]


def write_sidecar(file: Path, metadata: Mapping[str, str]) -> Path:
    """Write Lora-Manager's ``.metadata.json`` for the LoRA in ``file``, and return its path.

    A user's notes in an existing file stay; trigger words and data about the LoRA file are updated.
    Paths in it are names without a folder, which Lora-Manager completes.
    """
    path = file.with_suffix(_ENDINGS[0])
    there = _content(path)
    civitai = there.get("civitai")
    facts = {
        "file_name": file.stem,
        "file_path": file.name,
        "size": file.stat().st_size,
        "modified": file.stat().st_mtime,
        "sha256": file_digest(file),
        "preview_url": next((picture.name for picture in previews(file)), ""),
        "civitai": {
            **(civitai if isinstance(civitai, dict) else {}),
            _NAMES[0]: list(find_phrases(file, metadata).phrases),
        },
    }
    limits = {n: float(metadata[n]) for n in ("strength_min", "strength_max") if n in metadata}
    first = {
        **({"usage_tips": json.dumps(limits)} if limits else {}),
        "model_name": file.stem,
        "base_model": _BASES.get(metadata.get("ss_base_model_version", ""), "Unknown"),
        "modelDescription": metadata.get("modelspec.description", ""),
        "from_civitai": False,
    }
    with atomically(path) as unfinished:
        text = json.dumps({**first, **there, **facts}, indent=2, ensure_ascii=False)
        unfinished.write_text(text, encoding="utf-8")
    return path


def _content(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _phrases(path: Path) -> list[str]:
    content = _content(path)
    tables = [content, content.get("civitai")]
    lists = [table.get(name) for table in tables if isinstance(table, dict) for name in _NAMES]
    words = [word for some in lists if isinstance(some, list) for word in some]
    words.append(content.get("activation text"))  # Automatic1111's, the words as one text
    texts = [word.get("word") if isinstance(word, dict) else word for word in words]
    phrases = [cleaned(text) for text in texts if isinstance(text, str)]
    return list(dict.fromkeys(phrase for phrase in phrases if phrase))
