"""A card for a merged file: Markdown beside it, made from the file's own metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..lora_files.metadata import (
    merged_concepts,
    noted_phrases,
    parse_object,
    previews,
    write_sidecar,
)
from ..lora_files.tensors import read_header
from ..saving import atomically
from .report import MergeReport

_MARKS = re.compile(r"([\\`*_\[\]<>|#!])")


def card_files(file: Path) -> list[Path]:
    """The files that :func:`write_card` writes beside ``file``."""
    return [file.with_suffix(".md"), file.with_suffix(".metadata.json")]


def write_card(file: Path, report: MergeReport | None = None) -> list[Path]:
    """Write the card of the LoRA in ``file`` beside it, replacing an older one, and the notes that
    LoRA browsers read (:func:`..lora_files.metadata.write_sidecar`); returns both paths.

    Trigger words, sources with their licences and the recipe come from the file's metadata, the
    verdict from the ``report``, and images from files of the same name beside it.
    """
    _, metadata = read_header(file)
    card, _ = card_files(file)
    with atomically(card) as unfinished:
        unfinished.write_text(card_of(file, metadata, report), encoding="utf-8")
    return [card, write_sidecar(file, metadata)]


def card_of(file: Path, metadata: Mapping[str, str], report: MergeReport | None = None) -> str:
    """The Markdown of a card."""
    recipe = parse_object(metadata.get("iteris"))
    parts = [
        "---\ntags:\n- lora\n- iteris\n---",
        f"# {_plain(file.stem)}",
        *[f"![{_plain(picture.stem)}](<{picture.name}>)" for picture in previews(file)],
        _plain(metadata.get("modelspec.description", "")),
    ]
    if phrases := noted_phrases(metadata):
        parts += ["## Trigger words", "\n".join(f"- {_code(phrase)}" for phrase in phrases)]
    if concepts := merged_concepts(metadata):
        parts += ["## Merged from", "\n".join(_sources(concepts))]
    if licences := metadata.get("modelspec.license", ""):
        parts += ["Licences of the sources: " + _plain(licences)]
    if report is not None:
        parts += ["## Result", _plain(report.verdict())]
    if recipe:
        parts += ["## Recipe", "\n".join(_recipe(recipe, file.name))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sources(concepts: list[dict[str, Any]]) -> Iterator[str]:
    yield "| LoRA | SHA-256 | strength | weight |"
    yield "|---|---|--:|--:|"
    for one in concepts:
        digest = str(one.get("sha256") or "")[:12]
        numbers = [str(one.get(name, 1.0)) for name in ("strength", "weight")]
        yield f"| {' | '.join([_plain(str(one['lora'])), digest, *numbers])} |"


def _recipe(recipe: Mapping[str, Any], name: str) -> Iterator[str]:
    for part in ("method", "base", "preset", "settings", "calibration", "versions"):
        given = recipe.get(part)
        if isinstance(given, Mapping):
            given = ", ".join(f"{key}={value}" for key, value in given.items() if value is not None)
        if given:
            yield f"- {part}: {_code(str(given))}"
    yield ""
    yield f"The file contains the full recipe: `iteris merge --from {name} -o again.safetensors`."


def _plain(text: str) -> str:
    """Text on one line, with Markdown escaped."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"
