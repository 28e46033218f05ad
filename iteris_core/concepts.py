"""Concepts to merge: LoRAs, or their files, with the words that invoke them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    ConfigDict,
    Field,
    GetPydanticSchema,
    StrictFloat,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, PydanticCustomError, core_schema

from .calibration import TEMPLATES, prompt_list
from .errors import ConceptError, SettingsError, first_mistake, unknown
from .lora import Lora
from .lora_files import ReadOptions
from .lora_files.metadata import ALWAYS_ON, bare, find_phrases, noted_tags, parted, purpose_of

PromptKind = Literal["subject", "style", "tags", "video"]
AlwaysOn = Literal["no", "include", "outside"]


KINDS: Mapping[PromptKind, tuple[str, ...]] = {
    "subject": TEMPLATES,
    "style": prompt_list("style"),
    "tags": prompt_list("tags"),
    "video": prompt_list("video"),
}
"""Templates by kind of concept: a thing, a style, booru tags, or a motion."""
PRESERVE_WEIGHT = 0.2
"""Weight of prompts on which the base model should not change; a large one weakens the concepts."""


CONCEPT_KEYS = (
    "file", "trigger", "class", "kind", "always_on", "strength", "text_strength", "weight",
    "blocks", "layers", "prompts", "subjects", "sha256", "reading",
)  # fmt: skip
"""Keys of :meth:`Concept.to_dict`; people write all but the last three."""
_NUMBERS = ("strength", "text_strength", "weight")
_AsItIs = GetPydanticSchema(lambda source, handler: core_schema.any_schema())


@dataclass(
    frozen=True,
    config=ConfigDict(
        extra="forbid", populate_by_name=True, allow_inf_nan=False, coerce_numbers_to_str=True
    ),
)
class Concept:
    """One LoRA, its trigger words and its weight.

    ``prompts`` are used as they are; on others the merge keeps only a part of the LoRA. Without
    them, the templates of ``kind`` make prompts from ``trigger`` and ``class_word``, or from each
    of several ``subjects`` in turn (for a LoRA that is itself a merge). ``strength`` is that at
    which the LoRA would be loaded, ``text_strength`` that in the text encoders (None: the same);
    ``weight`` is how much the concept counts in the merge. ``inputs``, or what calling it returns,
    are batches of keyword arguments for hosts that do not work from prompts. Without ``lora`` and
    ``file`` the base model should not change, see :meth:`preserve`.

    ``always_on`` is for a LoRA that acts on every prompt: a speed LoRA (turbo, lightning), or a
    style, slider or detailer without a trigger. It is on while the others are merged. With
    ``include`` its change becomes part of the merged LoRA; with ``outside`` it is loaded beside it.
    Such a LoRA needs no words and no prompts.

    A LoRA that is still to be read is in ``file``; ``low`` is the file for the second of two
    experts. ``blocks`` and ``layers`` select the part that counts, as in
    :func:`.lora_files.blocks.filtered`. A recipe records ``sha256`` (of ``file``, or of both joined
    by a plus) and ``reading``. ``source`` says where the words come from, as in
    :func:`.lora_files.metadata.find_phrases`. ``changed`` is a time stamp of the files, so that a
    cache treats a rewritten file as another concept. ``row`` is where it stands in the user's list,
    for messages (0: nowhere). ``stated`` are the fields that were passed.

    Raises :class:`ConceptError` for a field of the wrong type or out of range.
    """

    lora: Annotated[Lora | None, _AsItIs] = None
    prompts: Sequence[str] | None = None
    trigger: str = ""
    class_word: Annotated[str, Field(validation_alias="class", serialization_alias="class")] = ""
    strength: StrictFloat = 1.0
    weight: Annotated[StrictFloat, Field(ge=0)] = 1.0
    inputs: Annotated[
        Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]] | None, _AsItIs
    ] = None
    text_strength: StrictFloat | None = None
    subjects: Sequence[str] = ()
    kind: PromptKind = "subject"
    always_on: AlwaysOn = "no"
    file: Path | None = None
    low: Path | None = None
    blocks: str = ""
    layers: str = ""
    sha256: str = ""
    reading: Mapping[str, Any] = field(default_factory=dict[str, Any])
    source: str = ""
    changed: int = 0
    row: int = field(default=0, repr=False, compare=False)
    stated: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, values: Any, validate: Callable[[Any], Any]) -> Any:
        """Note which fields were passed, and turn pydantic's errors into :class:`ConceptError`."""
        where = ""
        if isinstance(values, ArgsKwargs):
            names = (named.name for named in fields(cls))
            values = dict(zip(names, values.args, strict=False)) | (values.kwargs or {})
            name = values.get("trigger") or getattr(values.get("lora"), "name", "")
            where = f"{name or 'base'}: "
        if isinstance(values, dict):  # otherwise it is a concept already
            values = {"stated": frozenset(values), **values}
        try:
            return validate(values)
        except ValidationError as error:
            raise ConceptError(f"{where}{first_mistake(error)}") from None

    @field_validator("lora", mode="before")
    @classmethod
    def _lora(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            raise ConceptError(
                f"Concept({str(value)!r}): a concept needs a LoRA, not a file name; pass "
                f"host.read_lora({str(value)!r}), which reads it for the base model."
            )
        return value

    @field_validator("prompts", "subjects", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if isinstance(value, str):
            expected = f"Input should be a list of strings, such as [{value!r}]"
            raise PydanticCustomError("list_type", "{expected}", {"expected": expected})
        once = isinstance(value, Iterable) and not isinstance(value, Sequence | Mapping)
        return list(value) if once else value

    @field_validator(*_NUMBERS, mode="before")
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
    def _reading(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        for name, kind in (("energy", int | float), ("blocks", str), ("layers", str)):
            if name in value and not isinstance(value[name], kind):
                raise ValueError(f"{name} is {value[name]!r}")
        return value

    @classmethod
    def from_file(cls, host: Any, path: str | Path, **values: Any) -> Concept:
        """The LoRA in the file ``path``, read for the base model of ``host``.

        ``values`` are the other fields, such as ``strength=0.8``; :func:`recognised` adds to them.
        Raises :class:`LoraFileError` for a file that cannot be read.
        """
        if not hasattr(host, "read_lora"):
            raise ConceptError(
                f"{type(host).__name__} reads no LoRA; pass Concept.from_file a host for it, such "
                "as DiffusersHost(pipeline)."
            )
        lora = host.read_lora(path)
        known, _ = recognised(Path(path), lora.metadata, values.keys())
        return cls(lora, **{**known, **values})

    @classmethod
    def preserve(cls, prompts: Sequence[str], weight: float = PRESERVE_WEIGHT) -> Concept:
        """``prompts`` on which the base model should not change; ``weight`` as of a LoRA."""
        return cls(None, prompts, trigger="preserve", weight=weight)

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Concept:
        """The inverse of :meth:`to_dict`. Error messages use ``where`` to name ``values``.

        Raises :class:`ConceptError` for an unknown key or a value of the wrong type.
        """
        if not isinstance(values, Mapping):
            raise ConceptError(f"{where} must be a mapping, not {values!r}.")
        values = {k: v for k, v in values.items() if v is not None and (v != "" or k in _NUMBERS)}
        for key, value in values.items():
            if key in ("prompts", "subjects") and isinstance(value, list):
                values[key] = tuple(value)
            if key not in CONCEPT_KEYS:
                raise ConceptError(f"{where}: {unknown('key', key, CONCEPT_KEYS)}")
        if isinstance(values.get("file"), str):
            values["file"], values["low"] = split_files(values["file"])
        elif values.get("prompts") is not None:
            values = {"weight": PRESERVE_WEIGHT, "trigger": "preserve", **values}
        if not {"file", "prompts"} & values.keys():
            raise ConceptError(f"{where} has neither a file nor prompts that preserve the base.")
        try:
            concept = _CONCEPTS.validate_python(values, strict=False)  # numbers may be text
            concept.options()
        except (ConceptError, SettingsError) as error:
            raise ConceptError(f"{where}: {error}") from None
        return concept

    def to_dict(self) -> dict[str, Any]:
        """All of :data:`CONCEPT_KEYS`, in built-in types only, with what a LoRA that is read
        records of its file."""
        how: Any = {"mode": "json", "by_alias": True, "warnings": False}
        data = _CONCEPTS.dump_python(self, exclude={"lora", "inputs"}, **how)
        data["file"] = "+".join(map(str, self.files)) or None
        if self.lora is not None:
            recorded = {"sha256": self.lora.sha256, "reading": dict(self.lora.reading)}
            data |= {"file": self.lora.source or None, "blocks": "", "layers": "", **recorded}
        return {key: data[key] for key in CONCEPT_KEYS}

    @property
    def files(self) -> list[Path]:
        return [file for file in (self.file, self.low) if file is not None]

    @property
    def name(self) -> str:
        if self.lora is None and self.file is not None:
            return str(self.file)
        return self.trigger or (self.lora.name if self.lora is not None else "") or "base"

    @property
    def phrases(self) -> Sequence[str]:
        """The trigger words with the class word; usually one phrase."""
        phrase = f"{self.trigger} {self.class_word}".strip()
        return self.subjects or ([phrase] if phrase else [])

    @property
    def is_wordless(self) -> bool:
        """True if neither phrases, prompts nor inputs invoke its LoRA."""
        return not self.phrases and self.prompts is None and self.inputs is None

    @property
    def subject(self) -> str:
        """All phrases of the concept in one prompt."""
        return " and ".join(self.phrases)

    @property
    def preserves(self) -> bool:
        """True if there is no LoRA, only prompts on which the base should not change."""
        return self.lora is None and self.file is None

    @property
    def is_active(self) -> bool:
        """False for weight 0, or strength 0 everywhere: the concept is left out of the merge."""
        return self.weight > 0 and (self.preserves or any((self.strength, self.text_strength)))

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

    def called(self, phrases: Sequence[str], source: str = "") -> Concept:
        """A copy with ``phrases`` as trigger words."""
        return replace(self, **words_in(phrases), source=source)

    def with_found_words(self, metadata: Mapping[str, str]) -> Concept:
        """A copy with what the file says of itself, see :func:`recognised`."""
        if self.file is None or self.always_on != "no":
            return self
        words = {name for name in ("trigger", "class_word", "subjects") if getattr(self, name)}
        known = words if self.prompts is None else {"prompts"}
        known |= self.stated & {"kind", "always_on"}
        found, source = recognised(self.file, metadata, known)
        return replace(self, **found, source=self.source if words else source)


_CONCEPTS = TypeAdapter(Concept)


def split_files(text: str) -> tuple[Path, Path | None]:
    """FILE, or HIGH+LOW for a model with two experts."""
    high, plus, low = text.partition(".safetensors+")
    return (Path(f"{high}.safetensors"), Path(low)) if plus else (Path(text), None)


def recognised(
    file: Path, metadata: Mapping[str, str], known: Collection[str]
) -> tuple[dict[str, Any], str]:
    """Fields of the concept in ``file`` but for those ``known``, from its name, its metadata and a
    download helper's notes beside it, and the source of the words as in :func:`.find_phrases`: the
    trigger words; a style or booru tags as the kind; a speed LoRA, slider or detailer for which no
    words are given is always on, and part of the merged LoRA. See :func:`.purpose_of`."""
    worded = bool({"trigger", "class_word", "subjects", "prompts"} & set(known))
    phrases, source = find_phrases(file, metadata)
    purpose = None
    # A merged LoRA has the names of all that it was made of.
    if not {"kind", "always_on"} & set(known) and "iteris" not in metadata:
        purpose = purpose_of(file.name, metadata, noted_tags(file), phrases)
    if purpose in ALWAYS_ON and not worded:
        return {"always_on": "include"}, ""
    kind = {"kind": purpose} if purpose in get_args(PromptKind) else {}
    return (kind, "") if worded else ({**kind, **words_in(phrases)}, source)


def lines_of(text: str) -> list[str]:
    """The lines of ``text``, stripped, without empty ones."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def words_in(phrases: Sequence[str]) -> dict[str, Any]:
    """``trigger``, ``class_word`` and ``subjects`` for a :class:`Concept`. The trigger of a single
    phrase is its first word that is not common: "sks dog" becomes "sks" and "dog". If common words
    precede it, the phrase is the only subject; if there are no others, it is the trigger. Several
    phrases are kept as they are."""
    if len(phrases) != 1:
        return {"trigger": "", "class_word": "", "subjects": tuple(phrases)}
    phrase = bare(phrases[0])
    before, trigger, after = parted(phrase)
    return {
        "trigger": trigger or before,
        "class_word": "" if before else after,
        "subjects": (phrase,) if before and trigger else (),
    }
