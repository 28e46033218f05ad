"""One concept of a merge as configuration: with a file name in place of the LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from .concepts import PRESERVE_WEIGHT, Concept, words_in
from .errors import ConceptError, SettingsError, UsageError, did_you_mean
from .hosts.learned import embedding_triggers
from .hosts.protocol import Host
from .lora import Lora
from .lora_files import ReadOptions, ReleasedBases
from .lora_files.blocks import check_layers, weights_by_block
from .lora_files.experts import joined_experts
from .lora_files.sidecars import find_phrases
from .settings import Settings

WORDS = ("trigger", "class", "kind", "always_on")
NUMBERS = ("strength", "text_strength", "weight")
PARTS = ("blocks", "layers")
KEYS = ("file", *WORDS, *NUMBERS, *PARTS, "prompts", "samples", "subjects", "sha256", "reading")
"""Keys of a concept as a mapping; only recipes contain the last three."""


@dataclass(frozen=True)
class ConceptConfig(Concept):
    """A :class:`Concept` with a file name in place of the LoRA.

    ``low`` is the file for the second of two experts. Without ``file`` the base should not change.
    ``blocks`` and ``layers`` select the part that counts, as in
    :func:`.lora_files.blocks.filtered`. ``samples`` are the inputs for a transformers model. A
    recipe records ``sha256`` (of ``file``, or of both joined by a plus) and ``reading``. ``source``
    says where the words come from, as in :class:`.lora_files.metadata.FoundPhrases`. ``changed`` is
    a time stamp of the files, so that a cache treats a rewritten file as another concept.
    """

    lora: Lora | None = None
    file: Path | None = None
    low: Path | None = None
    blocks: str = ""
    layers: str = ""
    samples: Path | None = None
    sha256: str = ""
    reading: Mapping[str, Any] = field(default_factory=dict[str, Any])
    source: str = ""
    changed: int = 0

    @classmethod
    def of(cls, concept: Concept) -> ConceptConfig:
        """``concept`` with the recorded name, hash and reading of its LoRA's file."""
        lora = concept.lora or Lora({})
        file, low = split_files(lora.source) if lora.source else (None, None)
        shared = {name: getattr(concept, name) for name in _SHARED}
        return cls(file=file, low=low, sha256=lora.sha256, reading=dict(lora.reading), **shared)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> ConceptConfig:
        """The inverse of :meth:`to_dict`. Error messages use ``where`` to name ``values``.

        Raises :class:`ConceptError` for an unknown key or a value of the wrong type.
        """
        for key in values:
            if key not in KEYS:
                raise ConceptError(
                    f"{where}: there is no key {key!r}{did_you_mean(str(key), KEYS)} The keys of a "
                    f"concept are {', '.join(KEYS)}."
                )
        given = {
            "class_word" if key == "class" else key: _READERS[key](value, f"{where}: {key}")
            for key, value in values.items()
            if value is not None and (value != "" or key in NUMBERS)
        }
        if "file" in given:
            given["file"], given["low"] = split_files(given["file"])
        elif "prompts" in given:
            defaults: dict[str, Any] = {"weight": PRESERVE_WEIGHT, "trigger": "preserve"}
            given = {**defaults, **given}
        else:
            raise ConceptError(f"{where} has neither a file nor prompts that preserve the base.")
        try:
            return cls(**given)
        except SettingsError as error:
            raise ConceptError(f"{where}: {error}") from None

    def to_dict(self, name: Callable[[Path], str] = str, *, usual: bool = True) -> dict[str, Any]:
        """All :data:`KEYS`; ``name`` formats file names. Unless ``usual``, defaults are left
        out."""
        data = {key: getattr(self, "class_word" if key == "class" else key) for key in KEYS}
        data |= {
            "file": "+".join(map(name, self.files)) or None,
            "prompts": None if self.prompts is None else list(self.prompts),
            "samples": None if self.samples is None else name(self.samples),
            "subjects": list(self.subjects),
            "reading": dict(self.reading),
        }
        if usual:
            return data
        default = _DEFAULT if self.file else {**_DEFAULT, "weight": None}
        return {key: value for key, value in data.items() if value != default[key]}

    @property
    def files(self) -> list[Path]:
        return [file for file in (self.file, self.low) if file is not None]

    @property
    def name(self) -> str:
        return str(self.file) if self.file is not None else self.trigger

    @property
    def preserves(self) -> bool:
        return self.file is None

    def check(self) -> None:
        Settings.check(self)  # whoever makes one sets these

    def concept(self, lora: Lora | None = None) -> Concept:
        return Concept(lora, **{name: getattr(self, name) for name in _SHARED})

    def called(self, phrases: Sequence[str], source: str = "") -> ConceptConfig:
        """A copy with ``phrases`` as trigger words."""
        return replace(self, **words_in(phrases), source=source)

    def with_found_words(self, metadata: Mapping[str, str]) -> ConceptConfig:
        """A copy with trigger words from the file's ``metadata`` or the notes beside it, if it has
        none yet."""
        if self.file is None or self.phrases or self.always_on != "no":
            return self
        return self.called(*find_phrases(self.file, metadata))

    def read(
        self,
        host: Host | ReleasedBases,
        reading: ReadOptions | None = None,
        renames: Sequence[str] = (),
    ) -> Concept:
        """The concept with its LoRA.

        ``reading`` applies unless a recipe recorded other options; ``renames`` come after its own.
        Raises :class:`IterisError` for a file that does not fit ``host``.
        """
        if self.file is None:
            return self.concept()
        lora = _joined(host, self.files, self.reading_options(reading or ReadOptions()))
        named = self if self.prompts is not None else self.with_found_words(lora.metadata)
        return self.renamed(named.concept(lora), renames)

    def renamed(self, concept: Concept, renames: Sequence[str]) -> Concept:
        """``concept`` with its embeddings renamed as the recipe says, and then by ``renames``."""
        again = [str(text) for text in self.reading.get("rename") or ()]
        return renamed_in(concept, [*again, *renames])

    def reading_options(self, reading: ReadOptions) -> ReadOptions:
        """The options that a recipe recorded, or else ``reading``, with the selected blocks and
        layers."""
        partial = bool(self.reading.get("allow_partial")) or reading.allow_partial
        energy = self.reading.get("energy", reading.energy)
        parts = {name: getattr(self, name) or self.reading.get(name, "") for name in PARTS}
        return ReadOptions(partial, number(energy, f"{self.file}: energy"), **parts)


_DEFAULT = ConceptConfig().to_dict()
_SHARED = [f.name for f in fields(Concept) if f.name not in ("lora", "inputs")]


def split_files(text: str) -> tuple[Path, Path | None]:
    """FILE, or HIGH+LOW for a model with two experts."""
    high, plus, low = text.partition(".safetensors+")
    return (Path(f"{high}.safetensors"), Path(low)) if plus else (Path(text), None)


def number(value: Any, name: str) -> float:
    """``value`` as a finite number; otherwise raises :class:`ConceptError`."""
    try:
        parsed = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        parsed = math.nan
    if not math.isfinite(parsed):
        raise ConceptError(f"{name} must be a number, not {value!r}.")
    return parsed


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ConceptError(f"{name} must be text, not {value!r}.")
    return str(value)


def _texts(values: Any, name: str) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise ConceptError(f"{name} must be a list, not {values!r}.")
    return tuple(_text(value, name) for value in cast(Sequence[Any], values))


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConceptError(f"{name} must be a mapping, not {value!r}.")
    return cast(Mapping[str, Any], value)


def _part(value: Any, name: str) -> str:
    """A string, or a list of its parts."""
    parts = cast(Sequence[Any], value if isinstance(value, list | tuple) else [value])
    text = ",".join(_text(part, name) for part in parts)
    check = weights_by_block if name.endswith("blocks") else check_layers
    try:
        check(text)
    except ConceptError as error:
        raise ConceptError(f"{name.rpartition(':')[0]}: {error}") from None
    return text


_YAML = {"False": "no", "True": "yes"}
"""What YAML makes of the words no and yes."""
_READERS: Mapping[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(("file", *WORDS, "sha256"), _text),
    "always_on": lambda value, name: _text(_YAML.get(str(value), value), name),
    **dict.fromkeys(NUMBERS, number),
    **dict.fromkeys(PARTS, _part),
    **dict.fromkeys(("prompts", "subjects"), _texts),
    "samples": lambda value, name: Path(_text(value, name)),
    "reading": _mapping,
}
"""Key → the function that checks its value, and raises with its name."""


def _joined(host: Host | ReleasedBases, files: Sequence[Path], reading: ReadOptions) -> Lora:
    """The LoRA in one file, or in two for a model with two experts: high noise and low noise."""
    high, *others = [host.read_lora(file, reading) for file in files]
    if not others:
        return high
    experts = getattr(host, "experts", None)
    if not experts:
        raise ConceptError(f"{files[1]}: the base has one denoiser; give one file per concept.")
    return joined_experts(high, others[0], experts)


def parse_rename(text: str) -> tuple[str, str, str]:
    """Split ``[LORA:]NAME=NEW`` into the LoRA (empty: every one), an embedding's name and its new
    name. Raises :class:`IterisError` for any other text."""
    left, _, new = text.partition("=")
    owner, _, old = left.rpartition(":")
    if not old or not new:
        raise UsageError(f"--rename {text!r} is not LORA:NAME=NEW or NAME=NEW.")
    return owner, old, new


def renamed_in(concept: Concept, renames: Sequence[str]) -> Concept:
    """``concept`` with the embeddings of its LoRA renamed, and with them the words that call for
    them; ``renames`` are LORA:NAME=NEW, or NAME=NEW for every LoRA."""
    lora = concept.lora
    if not renames or lora is None:
        return concept
    names = {name: name for name in lora.embeddings}
    for owner, old, new in map(parse_rename, renames):
        if old in names and owner in ("", lora.name):
            names[old] = new
    if len(set(names.values())) < len(names):
        raise UsageError(f"{lora.name}: two embeddings would get the same name: {names}.")
    renamed = {names[name]: parts for name, parts in lora.embeddings.items()}
    lora = replace(lora, embeddings=renamed, reading={**lora.reading, "rename": list(renames)})
    words = embedding_triggers(concept)

    def of(texts: Sequence[str]) -> list[str]:
        return [words.renamed(text, names) for text in texts]

    prompts = None if concept.prompts is None else of(concept.prompts)
    trigger, subjects = of([concept.trigger])[0], of(concept.subjects)
    return replace(concept, lora=lora, prompts=prompts, trigger=trigger, subjects=subjects)
