"""What the concept nodes say, before a MODEL is there to read the LoRA file with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open

from ..iteris_core.concepts import Concept
from ..iteris_core.errors import LoraFileError
from ..iteris_core.lora import Lora
from ..iteris_core.lora_files.metadata import trigger_words


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
    if not (trigger or class_word or prompts.strip()):
        trigger, class_word = words_of(read_metadata(file))
    if embedding:
        trigger = f"embedding:{embedding}"
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
    """(trigger, class word) as far as a LoRA file tells, its best phrase split at the first blank:
    "sks dog" → ("sks", "dog")."""
    phrase = next(iter(trigger_words(metadata)), "")
    trigger, _, class_word = phrase.partition(" ")
    return trigger, class_word.strip()
