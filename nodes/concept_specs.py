"""What the concept nodes say, before a MODEL is there to read the LoRA file with."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open

from ..iteris_core.concepts import Concept, words_of
from ..iteris_core.errors import LoraFileError
from ..iteris_core.lora import Lora
from ..iteris_core.lora_files import ReadOptions
from ..iteris_core.lora_files.experts import joined_experts

DENOISER = "unet"
"""What the sites of a MODEL begin with."""


class Reader(Protocol):
    def read_lora(self, path: str | Path, options: ReadOptions | None = None) -> Lora: ...

    def read_low(self, path: str | Path, options: ReadOptions | None = None) -> Lora: ...


@dataclass(frozen=True)
class ConceptSpec:
    """A :class:`Concept` with a file instead of a LoRA; ``file=None`` keeps the base as it is.

    ``low`` is the file for the model for low noise, of models with two experts.
    ``clip_strength`` is that of its part in the text encoders (None: the same as ``strength``).
    ``changed`` is :func:`changed` of the file: a rewritten one is another concept.
    """

    file: Path | None
    prompts: tuple[str, ...] | None = None
    trigger: str = ""
    class_word: str = ""
    strength: float = 1.0
    weight: float = 1.0
    changed: int = 0
    clip_strength: float | None = None
    subjects: tuple[str, ...] = ()
    low: Path | None = None

    def read(self, reader: Reader, options: ReadOptions | None = None) -> Concept:
        lora = reader.read_lora(self.file, options) if self.file else None
        if lora is not None and self.low is not None:
            lora = joined_experts(lora, reader.read_low(self.low, options), DENOISER)
        return Concept(
            lora,
            self.prompts,
            self.trigger,
            self.class_word,
            self.strength,
            self.weight,
            text_strength=self.clip_strength,
            subjects=self.subjects,
        )


def make_spec(
    file: Path,
    *,
    trigger: str = "",
    class_word: str = "",
    prompts: str = "",
    strength: float = 1.0,
    clip_strength: float | None = None,
    weight: float = 1.0,
    embedding: str = "",
    low: Path | None = None,
) -> ConceptSpec:
    """Empty trigger and class word are taken from the file; an embedding stands for the trigger,
    of a file with several phrases for all of them."""
    trigger, class_word = trigger.strip(), class_word.strip()
    subjects: tuple[str, ...] = ()
    if not (trigger or class_word or prompts.strip()):
        trigger, class_word, subjects = words_of(read_metadata(file))
    if embedding:
        trigger, subjects = f"embedding:{embedding}", ()
    return ConceptSpec(
        file,
        prompt_lines(prompts) or None,
        trigger,
        class_word,
        strength,
        weight,
        max(changed(one) for one in (file, low) if one is not None),
        clip_strength,
        subjects,
        low,
    )


def changed(file: Path) -> int:
    """The time stamp of a LoRA file, or of an embedding beside it that is newer."""
    beside = file.parent.glob(f"{glob.escape(file.stem)}_*.safetensors")
    return max(path.stat().st_mtime_ns for path in (file, *beside))


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
