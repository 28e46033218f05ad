"""A merge as one value: its concepts, method and settings.

The command line, a merge file, a recipe, Python and the nodes all build one, and all read its
concepts' LoRAs here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .concepts import PRESERVE_WEIGHT, AlwaysOn, Concept, PromptKind, recognised, words_in
from .errors import ConceptError, IterisError, MergeFileError, SettingsError, did_you_mean
from .hosts.protocol import Host
from .lora import Lora
from .lora_files import ReadOptions, ReleasedBases
from .lora_files.experts import joined_experts
from .settings import PresetName

Unmergeable = Literal["refuse", "skip", "mean"]
_Kind = TypeVar("_Kind", bound="Config")


class Config(BaseModel):
    """A part of a merge. Raises ``failure`` for an unknown key or a wrong value."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )
    failure: ClassVar[type[IterisError]] = MergeFileError

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            mistake: Any = error.errors()[0]
            key, keys = mistake["loc"][0], self.key_names()
            what = f"{key}: {mistake['msg']}, not {mistake['input']!r}."
            if mistake["type"] == "extra_forbidden":
                guess = did_you_mean(key, keys)
                what = f"there is no key {key!r}{guess} The keys are {', '.join(keys)}."
            raise self.failure(what) from None

    @classmethod
    def key_names(cls) -> tuple[str, ...]:
        """The keys of :meth:`to_dict`."""
        fields = cls.model_fields.items()
        return tuple(of.serialization_alias or name for name, of in fields if not of.exclude)

    @classmethod
    def of_mapping(cls: type[_Kind], values: Mapping[Any, Any], where: str) -> _Kind:
        """One with those ``values`` that are not None; errors name it as ``where``."""
        try:
            return cls(**{str(key): value for key, value in values.items() if value is not None})
        except cls.failure as error:
            raise cls.failure(f"{where}: {error}") from None


_NUMBERS = ("strength", "text_strength", "weight")


class ConceptConfig(Config):
    """A concept whose LoRA is still in a file. Without ``file`` the base should not change.

    ``low`` is the file for the second of two experts. ``blocks`` and ``layers`` select the part
    that counts, as in :func:`.lora_files.blocks.filtered`. A recipe records ``sha256`` (of
    ``file``, or of both joined by a plus) and ``reading``. ``source`` says where the words come
    from, as in :class:`.lora_files.metadata.FoundPhrases`. ``changed`` is a time stamp of the
    files, so that a cache treats a rewritten file as another concept. The other fields are those of
    :class:`.concepts.Concept`.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)
    failure = ConceptError

    file: Path | None = None
    trigger: str = ""
    class_word: str = Field(default="", validation_alias="class", serialization_alias="class")
    kind: PromptKind = "subject"
    always_on: AlwaysOn = "no"
    strength: float = 1.0
    text_strength: float | None = None
    weight: float = Field(default=1.0, ge=0)
    blocks: str = ""
    layers: str = ""
    prompts: tuple[str, ...] | None = None
    subjects: tuple[str, ...] = ()
    sha256: str = ""
    reading: dict[str, Any] = {}
    low: Path | None = Field(default=None, exclude=True)
    source: str = Field(default="", exclude=True)
    changed: int = Field(default=0, exclude=True)

    @field_validator("strength", "text_strength", "weight", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which pydantic takes for 0 or 1
            raise ValueError("must be a number")
        return value

    @field_validator("blocks", "layers", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        """Of a list, whose items are the parts of the text."""
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else value

    @field_validator("always_on", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {"False": "no", "True": "yes"}.get(str(value), value)  # what YAML makes of them

    @field_validator("reading")
    @classmethod
    def _reading(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, kind in (("energy", int | float), ("blocks", str), ("layers", str)):
            if name in value and not isinstance(value[name], kind):
                raise ValueError(f"{name} is {value[name]!r}")
        return value

    @classmethod
    def of(cls, concept: Concept) -> ConceptConfig:
        """``concept`` with the recorded name, hash and reading of its LoRA's file."""
        lora = concept.lora or Lora({})
        file, low = split_files(lora.source) if lora.source else (None, None)
        shared = {name: getattr(concept, name) for name in _SHARED}
        return cls(file=file, low=low, sha256=lora.sha256, reading=dict(lora.reading), **shared)

    @classmethod
    def preserve(cls, prompts: Sequence[str], weight: float = PRESERVE_WEIGHT) -> ConceptConfig:
        """Prompts on which the base model should not change."""
        return cls(prompts=tuple(prompts), trigger="preserve", weight=weight)

    @classmethod
    def from_dict(cls, values: Any, where: str) -> ConceptConfig:
        """The inverse of :meth:`to_dict`. Error messages use ``where`` to name ``values``.

        Raises :class:`ConceptError` for an unknown key or a value of the wrong type.
        """
        if not isinstance(values, Mapping):
            raise ConceptError(f"{where} must be a mapping, not {values!r}.")
        values = {key: v for key, v in values.items() if v != "" or key in _NUMBERS}
        if isinstance(values.get("file"), str):
            values["file"], values["low"] = split_files(values["file"])
        elif values.get("prompts") is not None:
            values = {"weight": PRESERVE_WEIGHT, "trigger": "preserve", **values}
        config = cls.of_mapping(values, where)
        if config.file is None and config.prompts is None:
            raise ConceptError(f"{where} has neither a file nor prompts that preserve the base.")
        try:
            config.options()
        except (ConceptError, SettingsError) as error:
            raise ConceptError(f"{where}: {error}") from None
        return config

    def to_dict(self) -> dict[str, Any]:
        """All :meth:`key_names`, in built-in types only."""
        data = self.model_dump(mode="json", by_alias=True)
        return data | ({"file": "+".join(map(str, self.files))} if self.files else {})

    @property
    def files(self) -> list[Path]:
        return [file for file in (self.file, self.low) if file is not None]

    @property
    def name(self) -> str:
        return str(self.file) if self.file is not None else self.trigger

    @property
    def preserves(self) -> bool:
        """True if there is no LoRA, only prompts on which the base should not change."""
        return self.file is None

    @property
    def phrases(self) -> Sequence[str]:
        """As :attr:`.Concept.phrases`."""
        return self.concept().phrases

    @property
    def is_active(self) -> bool:
        """As :attr:`.Concept.is_active`."""
        return self.concept(None if self.preserves else Lora({})).is_active

    def concept(self, lora: Lora | None = None) -> Concept:
        return Concept(lora, **{name: getattr(self, name) for name in _SHARED})

    def options(self, default: ReadOptions | None = None) -> ReadOptions:
        """How its LoRA is read; by ``default`` unless a recipe recorded something else."""
        default, recorded = default or ReadOptions(), self.reading
        text = self.strength if self.text_strength is None else self.text_strength
        return replace(
            default,
            allow_partial=bool(recorded.get("allow_partial")) or default.allow_partial,
            energy=recorded.get("energy", default.energy),
            text=text != 0,  # at strength 0 its text encoders may be another base's, or missing
            blocks=self.blocks or recorded.get("blocks", ""),
            layers=self.layers or recorded.get("layers", ""),
        )

    def called(self, phrases: Sequence[str], source: str = "") -> ConceptConfig:
        """A copy with ``phrases`` as trigger words."""
        return self.model_copy(update={**words_in(phrases), "source": source})

    def with_found_words(self, metadata: Mapping[str, str]) -> ConceptConfig:
        """A copy with what the file says of itself, see :func:`.concepts.recognised`."""
        if self.file is None or self.always_on != "no":
            return self
        words = {name for name in ("trigger", "class_word", "subjects") if getattr(self, name)}
        set_fields = self.model_fields_set & {"kind", "always_on"}
        set_fields |= words if self.prompts is None else {"prompts"}
        fields, source = recognised(self.file, metadata, set_fields)
        return self.model_copy(update={**fields, **({} if words else {"source": source})})


_SHARED = [name for name in ConceptConfig.model_fields if name in Concept.__dataclass_fields__]


def split_files(text: str) -> tuple[Path, Path | None]:
    """FILE, or HIGH+LOW for a model with two experts."""
    high, plus, low = text.partition(".safetensors+")
    return (Path(f"{high}.safetensors"), Path(low)) if plus else (Path(text), None)


class MergeConfig(Config):
    """A complete merge request. ``settings`` belong to the ``method``, ``calibration`` controls how
    features are collected; both override the ``preset``.

    ``base`` is the model's folder, file or hub name. ``unmergeable`` is as in
    :func:`.merge.merge_loras`.
    """

    base: str = ""
    method: str = "iteris"
    preset: PresetName = "default"
    unmergeable: Unmergeable = "refuse"
    concepts: tuple[ConceptConfig, ...] = ()
    settings: Mapping[str, Any] = {}
    calibration: Mapping[str, Any] = {}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> MergeConfig:
        """The inverse of :meth:`to_dict`. Error messages use ``where`` to name ``data``.

        Raises :class:`MergeFileError` for an unknown key or a value of the wrong type, and
        :class:`ConceptError` for a concept.
        """
        data = dict(data)
        if isinstance(data.get("concepts"), list):
            data["concepts"] = [
                ConceptConfig.from_dict(entry, f"{where}: concept {number}")
                for number, entry in enumerate(data["concepts"], 1)
            ]
        return cls.of_mapping(data, where)

    @property
    def choices(self) -> dict[str, Any]:
        """Arguments of :func:`.merge.merge_loras` and :func:`.preview.preview_merge` by name."""
        names = ("method", "preset", "settings", "calibration", "unmergeable")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The configuration in built-in types only."""
        concepts = [concept.to_dict() for concept in self.concepts]
        return {key: getattr(self, key) for key in self.key_names()} | {"concepts": concepts}


def read_concepts(host: Host | None, concepts: Any) -> list[Concept]:
    """``concepts`` with their LoRAs; a file has its words in its metadata or in a note beside it.
    Raises :class:`SettingsError` for anything but a list of concepts."""
    if isinstance(concepts, str | Path | Concept):
        what = "a single Concept" if isinstance(concepts, Concept) else repr(str(concepts))
        raise SettingsError(f"concepts must be a list, not {what}; put it in brackets: [...].")
    read: list[Concept] = []
    for concept in concepts:
        if isinstance(concept, str | Path):
            concept = ConceptConfig(file=Path(concept))
        if isinstance(concept, ConceptConfig):
            concept = read_concept(concept, host or ReleasedBases())
        if not isinstance(concept, Concept):
            raise SettingsError(
                f"concepts must be a list of Concept, not of {type(concept).__name__}; pass "
                "[Concept(host.read_lora(file), trigger=…), …]."
            )
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
    check_merging(read)
    return read


def check_merging(concepts: Sequence[Concept | ConceptConfig]) -> None:
    """Raise :class:`ConceptError` if every LoRA stays outside the merged one."""
    loras = [concept for concept in concepts if concept.is_active and not concept.preserves]
    if loras and all(lora.always_on == "outside" for lora in loras):
        raise ConceptError(
            f"There is nothing to merge: {', '.join(lora.name for lora in loras)} is only loaded "
            "beside the merged LoRA (always_on=outside). Add a LoRA, or give always_on=include."
        )


def read_concept(
    config: ConceptConfig, host: Host | ReleasedBases, options: ReadOptions | None = None
) -> Concept:
    """The concept with its LoRA, or with those of two experts as one.

    ``options`` apply unless a recipe recorded others. Raises :class:`IterisError` for a file that
    does not fit ``host``.
    """
    if config.file is None:
        return config.concept()
    options = config.options(options)
    lora = host.read_lora(config.file, options)
    if config.low is not None:
        experts = getattr(host, "experts", None)
        if not experts:
            raise ConceptError(
                f"{config.low}: the base has one denoiser; give one file per concept."
            )
        read_low = getattr(host, "read_low", host.read_lora)
        lora = joined_experts(lora, read_low(config.low, options), experts)
    return config.with_found_words(lora.metadata).concept(lora)
