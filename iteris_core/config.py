"""A merge as one value: its concepts, method and settings.

The command line, a merge file, a recipe, Python and the nodes all build one, and all read its
concepts' LoRAs here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from .concepts import Concept
from .errors import ConceptError, MergeFileError, SettingsError, first_mistake
from .hosts.protocol import Host
from .lora_files import ReadOptions, read_for_released
from .lora_files.experts import joined_experts
from .settings import PresetName

Unmergeable = Literal["refuse", "skip", "mean"]


class MergeConfig(BaseModel):
    """A complete merge request. ``settings`` belong to the ``method``, ``calibration`` controls how
    features are collected; both override the ``preset``.

    ``base`` is the model's folder, file or hub name. ``unmergeable`` is as in
    :func:`.merge.merge_loras`. Raises :class:`MergeFileError` for an unknown key or a value of the
    wrong type.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = ""
    method: str = "iteris"
    preset: PresetName = "default"
    unmergeable: Unmergeable = "refuse"
    concepts: tuple[Concept, ...] = ()
    settings: Mapping[str, Any] = {}
    calibration: Mapping[str, Any] = {}

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, values: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(values)
        except ValidationError as error:
            raise MergeFileError(first_mistake(error)) from None

    @classmethod
    def from_dict(cls, data: Mapping[Any, Any], where: str) -> MergeConfig:
        """The inverse of :meth:`to_dict`, without keys that are None. Error messages use ``where``
        to name ``data``; also raises :class:`ConceptError` for a concept."""
        values = {str(key): value for key, value in data.items() if value is not None}
        if isinstance(values.get("concepts"), list):
            values["concepts"] = tuple(
                Concept.from_dict(entry, f"{where}: concept {number}")
                for number, entry in enumerate(values["concepts"], 1)
            )
        try:
            return cls(**values)
        except MergeFileError as error:
            raise MergeFileError(f"{where}: {error}") from None

    @property
    def choices(self) -> dict[str, Any]:
        """Arguments of :func:`.merge.merge_loras` and :func:`.preview.preview_merge` by name."""
        names = ("method", "preset", "settings", "calibration", "unmergeable")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The configuration in built-in types only."""
        concepts = [concept.to_dict() for concept in self.concepts]
        return {**vars(self), "concepts": concepts}


def read_concepts(host: Host | None, concepts: Any) -> list[Concept]:
    """``concepts`` with their LoRAs; a file has its words in its metadata or in a note beside it.
    Raises :class:`SettingsError` for anything but a list of concepts."""
    if isinstance(concepts, str | Path | Concept):
        what = "a single Concept" if isinstance(concepts, Concept) else repr(str(concepts))
        raise SettingsError(f"concepts must be a list, not {what}; put it in brackets: [...].")
    read: list[Concept] = []
    for concept in concepts:
        if isinstance(concept, str | Path):
            concept = Concept(file=Path(concept))
        if not isinstance(concept, Concept):
            raise SettingsError(
                f"concepts must be a list of Concept, not of {type(concept).__name__}; pass "
                "[Concept(host.read_lora(file), trigger=…), …]."
            )
        if concept.lora is None:
            concept = read_concept(concept, host)
        lora = concept.lora
        if lora is None and concept.always_on != "no":
            raise SettingsError(f"{concept.name}: only a concept with a LoRA can be always on.")
        half = {  # of Lora(…) in Python; files are read in float32
            site: change.to(torch.float32)
            for site, change in (lora.sites.items() if lora else ())
            if min(change.up.element_size(), change.down.element_size()) < 4
        }
        if lora and half:
            concept = replace(concept, lora=replace(lora, sites={**lora.sites, **half}))
        read.append(concept)
    return read


def ready_to_merge(
    concepts: Sequence[Concept], *, by_features: bool, pictures: bool
) -> list[Concept]:
    """``concepts`` as they are merged. ``by_features`` of a model of ``pictures``, LoRAs without
    words act on every prompt, so they are always on. Raises :class:`ConceptError` if nothing is
    left to merge."""
    wordless = [
        by_features
        and pictures
        and not concept.preserves
        and concept.always_on == "no"
        and concept.is_wordless
        for concept in concepts
    ]
    ready = [
        replace(concept, always_on="include") if of else concept
        for concept, of in zip(concepts, wordless, strict=True)
    ]
    loras = [concept for concept in ready if concept.is_active and not concept.preserves]
    names = " and ".join(lora.name for lora in loras)
    if loras and all(lora.always_on == "outside" for lora in loras):
        raise ConceptError(
            f"There is nothing to merge: {names} {'are' if len(loras) > 1 else 'is'} only loaded "
            "beside the merged LoRA (always_on=outside). Add a LoRA, or give always_on=include."
        )
    if not by_features or not loras or any(lora.always_on == "no" for lora in loras):
        return ready
    named = [c.name for c, of in zip(concepts, wordless, strict=True) if of and c.is_active]
    if named:
        have, would = "have", "they would only be added up, as when all are loaded"
        if len(named) == 1:
            have, would = "has", "it would stay as it is"
        raise ConceptError(
            f"There is nothing to merge: {' and '.join(named)} {have} no trigger words, so {would}."
            " Give each its words: on IterIS LoRAs in ComfyUI, as FILE:WORDS on the command line."
        )
    raise ConceptError(
        f"There is nothing to merge: {names} {'are' if len(loras) > 1 else 'is'} always on. Add a "
        "LoRA that trigger words invoke, or use option method sum, which adds LoRAs up."
    )


def read_concept(
    concept: Concept, host: Host | None, options: ReadOptions | None = None
) -> Concept:
    """The concept with the LoRA in its file, or with those of two experts as one.

    ``options`` apply unless a recipe recorded others. Raises :class:`IterisError` for a file that
    does not fit ``host``, or without one the released model for which it was made.
    """
    if concept.file is None:
        return concept
    options = concept.options(options)
    read_lora = host.read_lora if host is not None else read_for_released
    lora = read_lora(concept.file, options)
    if concept.low is not None:
        experts = getattr(host, "experts", None)
        if not experts:
            raise ConceptError(
                f"{concept.low}: the base has one denoiser; give one file per concept."
            )
        read_low = getattr(host, "read_low", read_lora)
        lora = joined_experts(lora, read_low(concept.low, options), experts)
    return replace(concept.with_found_words(lora.metadata), lora=lora)
