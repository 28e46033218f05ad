"""A merged file's card, which is made from its metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

from ..lora_files.metadata import merged_concepts, noted_phrases, parse_object, previews
from ..lora_files.tensors import read_header
from ..passes.report import MergeReport
from ..saving import atomically
from .provenance import without_files

_MARKS = re.compile(r"([\\`*_\[\]<>|#!])")
_HUB_LICENCES = {
    *("mit", "apache-2.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0"),
    *("cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "openrail", "openrail++", "creativeml-openrail-m"),
}
"""The Hub's names of licences; it refuses a card with another."""


def write_card(file: Path, report: MergeReport | None = None) -> Path:
    """Write the card of the LoRA in ``file``, a ``.md`` beside it, in place of an older one.

    Trigger words, sources with their licences and the recipe come from the file's metadata, the
    verdict from the ``report``, and images from files of the same name beside it.
    """
    _, metadata = read_header(file)
    card = file.with_suffix(".md")
    with atomically(card) as unfinished:
        unfinished.write_text(card_of(file, metadata, report), encoding="utf-8")
    return card


def card_of(file: Path, metadata: Mapping[str, str], report: MergeReport | None = None) -> str:
    """The Markdown of a card."""
    recipe = parse_object(metadata.get("iteris"))
    parts = [
        f"---\n{hub_data(metadata).to_yaml()}\n---",
        f"# {_plain(file.stem)}",
        *[f"![{_plain(picture.stem)}](<{picture.name}>)" for picture in previews(file)],
        _plain(metadata.get("modelspec.description", "")),
    ]
    if phrases := noted_phrases(metadata):
        parts += ["## Trigger words", "\n".join(f"- {_code(phrase)}" for phrase in phrases)]
    if concepts := merged_concepts(metadata):
        rows = ["| LoRA | SHA-256 | strength | weight |", "|---|---|--:|--:|"]
        for concept in concepts:
            digest = str(concept.get("sha256") or "")[:12]
            numbers = [str(concept.get(name, 1.0)) for name in ("strength", "weight")]
            rows.append(f"| {' | '.join([_plain(str(concept['lora'])), digest, *numbers])} |")
        parts += ["## Merged from", "\n".join(rows)]
    if licences := metadata.get("modelspec.license", ""):
        parts += ["Licences of the sources: " + _plain(licences)]
    if report is not None:
        parts += ["## Result", _plain(report.verdict())]
    lines: list[str] = []
    for name in ("method", "base", "preset", "settings", "calibration", "versions"):
        value = recipe.get(name)
        if isinstance(value, Mapping):
            value = ", ".join(f"{key}={of}" for key, of in value.items() if of is not None)
        if value:
            lines.append(f"- {name}: {_code(str(value))}")
    if recipe:
        again = f"`iteris merge --from {file.name} -o again.safetensors`"
        whole = f"The file contains the full recipe: {again}."
        if loose := without_files(metadata):
            whole = f"It cannot be merged again: {_plain(loose[0])} was made in Python."
        lines += ["", whole]
        parts += ["## Recipe", "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def hub_data(metadata: Mapping[str, str]) -> ModelCardData:
    """What the Hub reads in a card: the base if it is there, the licence if all sources have the
    same, and the trigger words."""
    base = str(parse_object(metadata.get("iteris")).get("base") or "")
    licences = [entry for entry in metadata.get("modelspec.license", "").split("; ") if entry]
    names = {entry.rpartition(": ")[2].lower() for entry in licences}
    agreed = len(names) == 1 and len(licences) >= len(merged_concepts(metadata))
    return ModelCardData(
        base_model=base if "/" in base else None,
        library_name="diffusers" if "modelspec.architecture" in metadata else None,
        license=names.pop() if agreed and names <= _HUB_LICENCES else None,
        tags=["lora", "iteris"],
        instance_prompt=", ".join(noted_phrases(metadata)) or None,
    )


def _plain(text: str) -> str:
    """Text on one line, with Markdown escaped."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"
