"""Reads concepts: the LoRA in a file, with its words, its part and its embeddings' names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .concepts import Concept
from .config import ConceptConfig
from .errors import ConceptError, SettingsError
from .hosts.protocol import Host
from .lora_files import ReadOptions, ReleasedBases
from .lora_files.experts import joined_experts


def read_concepts(host: Host | None, concepts: Any) -> list[Concept]:
    """``concepts`` with their LoRAs; a file has its words in its metadata or in a note beside it.
    Raises :class:`SettingsError` for anything but a list of concepts."""
    if isinstance(concepts, str | Path | Concept):
        what = "a single Concept" if isinstance(concepts, Concept) else repr(str(concepts))
        raise SettingsError(f"concepts must be a list, not {what}; put it in brackets: [...].")
    read: list[Concept] = []
    for one in concepts:
        if isinstance(one, str | Path):
            one = ConceptConfig(file=Path(one))
        if isinstance(one, ConceptConfig):
            one = read_concept(one, host or ReleasedBases())
        if not isinstance(one, Concept):
            raise SettingsError(
                f"concepts must be a list of Concept, not of {type(one).__name__}; pass "
                "[Concept(host.read_lora(file), trigger=…), …]."
            )
        if one.lora is None and one.always_on != "no":
            raise SettingsError(f"{one.name}: only a concept with a LoRA can be always on.")
        read.append(one)
    return read


def read_concept(
    config: ConceptConfig,
    host: Host | ReleasedBases,
    options: ReadOptions | None = None,
) -> Concept:
    """The concept with its LoRA, or with those of two experts as one.

    ``options`` apply unless a recipe recorded others. Raises :class:`IterisError` for a file that
    does not fit ``host``.
    """
    if config.file is None:
        return config.concept()
    options = _options(config, options or ReadOptions())
    lora = host.read_lora(config.file, options)
    if config.low is not None:
        experts = getattr(host, "experts", None)
        if not experts:
            raise ConceptError(
                f"{config.low}: the base has one denoiser; give one file per concept."
            )
        read_low = getattr(host, "read_low", host.read_lora)
        lora = joined_experts(lora, read_low(config.low, options), experts)
    named = config if config.prompts is not None else config.with_found_words(lora.metadata)
    return named.concept(lora)


def _options(config: ConceptConfig, given: ReadOptions) -> ReadOptions:
    """The options that a recipe recorded, or else those ``given``, with the part of the LoRA that
    counts. At strength 0 its text encoders may be those of another base, or missing."""
    text = config.strength if config.text_strength is None else config.text_strength
    recorded = config.reading
    return replace(
        given,
        allow_partial=bool(recorded.get("allow_partial")) or given.allow_partial,
        energy=recorded.get("energy", given.energy),
        text=text != 0,
        blocks=config.blocks or recorded.get("blocks", ""),
        layers=config.layers or recorded.get("layers", ""),
    )
