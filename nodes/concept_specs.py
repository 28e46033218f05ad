"""What the concept nodes say, before a MODEL is there to read the LoRA file with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from ..iteris_core.calibration import Concept
from ..iteris_core.errors import LoraFileError
from ..iteris_core.lora import Lora


class Reader(Protocol):
    def read_lora(self, path: str | Path) -> Lora: ...


@dataclass(frozen=True)
class ConceptSpec:
    """A :class:`Concept` with a file instead of a LoRA; ``file=None`` keeps the base as it is.

    ``changed`` is the file's time stamp: a rewritten file is another concept.
    """

    file: Path | None
    prompts: tuple[str, ...] | None = None
    trigger: str = ""
    class_word: str = ""
    strength: float = 1.0
    weight: float = 1.0
    changed: int = 0

    def read(self, reader: Reader) -> Concept:
        lora = reader.read_lora(self.file) if self.file else None
        return Concept(
            lora, self.prompts, self.trigger, self.class_word, self.strength, self.weight
        )


def make_spec(
    file: Path,
    *,
    trigger: str = "",
    class_word: str = "",
    prompts: str = "",
    strength: float = 1.0,
    weight: float = 1.0,
    embedding: str = "",
) -> ConceptSpec:
    """Empty trigger and class word are taken from the file; an embedding stands for the trigger."""
    trigger, class_word = trigger.strip(), class_word.strip()
    if embedding:
        trigger = f"embedding:{embedding}"
    if not (trigger or class_word or prompts.strip()):
        trigger, class_word = words_of(read_metadata(file))
    return ConceptSpec(
        file,
        prompt_lines(prompts) or None,
        trigger,
        class_word,
        strength,
        weight,
        file.stat().st_mtime_ns,
    )


def prompt_lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def read_metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise LoraFileError(
            f"{file} is not a whole safetensors file ({error}); download or save it again."
        ) from error


def words_of(metadata: Mapping[str, str]) -> tuple[str, str]:
    """(trigger, class word) as far as a LoRA file tells: its trigger phrase, the folder that its
    pictures lay in ("10_sks dog"), or the caption tag that is on nearly all of them."""
    phrase = metadata.get("modelspec.trigger_phrase", "").split(",")[0].strip()
    if phrase:
        return _split(phrase)
    for folder in _folders(metadata):
        repeats, _, words = folder.partition("_")
        if repeats.isdigit() and words.strip():
            return _split(words.strip())
    tags = _tags(metadata)
    return (tags.most_common(1)[0][0], "") if tags else ("", "")


def _split(phrase: str) -> tuple[str, str]:
    """ "sks dog" → ("sks", "dog")"""
    trigger, _, class_word = phrase.partition(" ")
    return trigger, class_word


def _folders(metadata: Mapping[str, str]) -> Sequence[str]:
    found = _json(metadata.get("ss_dataset_dirs"))
    return list(found) if isinstance(found, dict) else []


def _tags(metadata: Mapping[str, str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    found = _json(metadata.get("ss_tag_frequency"))
    for tags in found.values() if isinstance(found, dict) else ():
        if isinstance(tags, dict):
            counts.update({tag.strip(): int(count) for tag, count in tags.items()})
    return counts


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except ValueError:
        return None
