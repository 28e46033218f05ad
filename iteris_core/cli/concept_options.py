"""Concepts as the command line, a merge file or a recipe names them, and their LoRAs read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from ..concepts import KINDS, PRESERVE_WEIGHT, Concept, PromptKind, Words, words_in
from ..errors import ConceptError, UsageError, did_you_mean
from ..hosts.protocol import Host
from ..lora import Lora
from ..lora_files import ReadOptions
from ..lora_files.experts import joined_experts
from ..lora_files.sidecars import find_phrases
from .options import read_prompts

Find = Callable[[str], Path]
"""Where the file is that is named so."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
# A path may have colons, as in C:\loras\cat.safetensors:sks:cat.
_SHORT = re.compile(f"(.+?):([^:]*):([^:]*)(?::({_NUMBER})(?:/({_NUMBER}))?)?")
_WORDS = ("trigger", "class", "kind")
_NUMBERS = ("strength", "text_strength", "weight")
KEYS = ("file", *_WORDS, *_NUMBERS, "prompts", "samples", "subjects", "sha256", "reading")
"""What a mapping may say of a concept; the last three are what a recipe records."""
_KEY = re.compile(rf",\s*(?=(?:{'|'.join(KEYS[:-3])})=)")
_UNKNOWN_KEY = re.compile(r",\s*([A-Za-z_]\w*)=")


@dataclass(frozen=True)
class ConceptOption:
    """A :class:`Concept` with the name of a file instead of a LoRA.

    ``low`` is the file for the second of two experts; without ``file`` the base is to stay as it
    is. ``samples`` are what a model of transformers is run on. ``sha256`` (of ``file``, or of both
    with a plus between) and ``reading`` are what a recipe has recorded.
    """

    file: Path | None = None
    trigger: str = ""
    class_word: str = ""
    strength: float = 1.0
    text_strength: float | None = None
    weight: float = 1.0
    low: Path | None = None
    prompts: Sequence[str] | None = None
    samples: Path | None = None
    subjects: Sequence[str] = ()
    kind: PromptKind = "subject"
    sha256: str = ""
    reading: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def files(self) -> list[Path]:
        return [file for file in (self.file, self.low) if file is not None]

    def to_dict(self, name: Callable[[Path], str] = str) -> dict[str, Any]:
        """What :func:`concept_of` takes, without what is as it is by default; ``name`` says how a
        file is written."""
        data = {
            "file": "+".join(map(name, self.files)) or None,
            "trigger": self.trigger or None,
            "class": self.class_word or None,
            "kind": None if self.kind == "subject" else self.kind,
            "strength": None if self.strength == 1 else self.strength,
            "text_strength": self.text_strength,
            "weight": None if self.weight == 1 and self.file is not None else self.weight,
            "prompts": None if self.prompts is None else list(self.prompts),
            "samples": None if self.samples is None else name(self.samples),
            "subjects": list(self.subjects) or None,
            "sha256": self.sha256 or None,
            "reading": dict(self.reading) or None,
        }
        return {key: value for key, value in data.items() if value is not None}


def split_files(text: str) -> tuple[Path, Path | None]:
    """FILE, or HIGH+LOW of a model with two experts."""
    high, plus, low = text.partition(".safetensors+")
    return (Path(f"{high}.safetensors"), Path(low)) if plus else (Path(text), None)


def parse_concept(text: str, find: Find = Path, *, adapter: bool = False) -> ConceptOption:
    """FILE[:TRIGGER:CLASS[:STRENGTH[/TEXT]]][,KEY=VALUE]…, where FILE may be HIGH+LOW; of an
    ``adapter`` of peft FOLDER:SAMPLES[:STRENGTH]."""
    where = f"--concept {text!r}"
    head, *pairs = _KEY.split(f",{text}")
    _refuse_unknown_keys(where, [head.removeprefix(","), *pairs])
    split = [pair.partition("=") for pair in pairs]
    values: dict[str, Any] = {key: value for key, _, value in split}
    if len(values) < len(pairs):
        raise ConceptError(f"{where} says one thing twice; a key is given once.")
    head = head.removeprefix(",")
    if head:
        in_front = _adapter(head) if adapter else _short(head, bool(pairs))
        twice = sorted(in_front.keys() & values.keys())
        if twice:
            raise ConceptError(f"{where} gives {', '.join(twice)} twice; leave one out.")
        values = {**in_front, **values}
    return concept_of(values, where, find)


def first_name(text: str) -> str:
    """What stands before the first colon or key: with an adapter of peft, its folder."""
    return _KEY.split(text)[0].removeprefix("file=").partition(":")[0]


def _refuse_unknown_keys(where: str, parts: Sequence[str]) -> None:
    """Raise for ``,KEY=`` with a KEY that no concept has: it would become a part of the words."""
    for found in filter(None, map(_UNKNOWN_KEY.search, parts)):
        key, known = found[1], KEYS[:-3]
        raise ConceptError(
            f"{where}: there is no key {key!r}{did_you_mean(key, known)} The keys are "
            f"{', '.join(known)}. Words that have a comma and an = go into a merge file."
        )


def _short(text: str, alone: bool) -> dict[str, Any]:
    if text.endswith(".safetensors"):
        return {"file": text}
    _, named, words = text.rpartition(".safetensors:")
    strength = ":".join(words.split(":")[2:])
    if named and words.count(":") > 1 and not re.fullmatch(f"{_NUMBER}(/{_NUMBER})?", strength):
        raise ConceptError(
            f"--concept {text!r}: the strength must be a number such as 0.8, or two such as "
            f"0.8/0.5 (the model's and the text encoders'), not {strength!r}."
        )
    parts = _SHORT.fullmatch(text)
    if parts is not None:
        keys = ("file", *_WORDS[:2], "strength", "text_strength")
        return {k: value for k, value in zip(keys, parts.groups(), strict=True) if value}
    if alone and not named:
        return {"file": text}
    raise ConceptError(
        f"--concept {text!r} is not FILE:TRIGGER:CLASS, FILE:TRIGGER:CLASS:STRENGTH or "
        "FILE:TRIGGER:CLASS:STRENGTH/TEXT (the strength of the text encoders), such as "
        "cat.safetensors:sks:cat:0.8/0.5, with ,weight=2 or ,prompts=cat.txt behind it; or FILE "
        "alone, if its metadata have a trigger."
    )


def _adapter(text: str) -> dict[str, Any]:
    folder, _, rest = text.partition(":")
    samples, _, strength = rest.partition(":")
    if not re.fullmatch(_NUMBER, strength or "1"):
        raise ConceptError(
            f"--concept {text!r} is not FOLDER:SAMPLES or FOLDER:SAMPLES:STRENGTH, such as "
            "adapters/joy:joy.txt; SAMPLES is a text file with one sample a line, or a "
            ".safetensors with the model's inputs."
        )
    found = {"file": folder, "samples": samples, "strength": strength}
    return {key: value for key, value in found.items() if value}


def concept_of(values: Mapping[str, Any], where: str, find: Find | None = Path) -> ConceptOption:
    """A concept from :data:`KEYS`. ``where`` is what an error says of it. Without ``find`` prompts
    are no file, as in a recipe, which may be anybody's."""
    for key in values:
        if key not in KEYS:
            raise ConceptError(
                f"{where}: there is no key {key!r}{did_you_mean(str(key), KEYS)} The keys of a "
                f"concept are {', '.join(KEYS)}."
            )
    given = {key: value for key, value in values.items() if value is not None}
    numbers = {key: _number(given[key], f"{where}: {key}") for key in _NUMBERS if key in given}
    if numbers.get("weight", 0) < 0:
        raise ConceptError(f"{where}: weight must be 0 or more, not {numbers['weight']:g}.")
    texts = {key: _text(given.get(key, ""), f"{where}: {key}") for key in ("file", *_WORDS)}
    if texts["kind"] and texts["kind"] not in KINDS:
        raise ConceptError(
            f"{where}: kind must be one of {', '.join(KINDS)}, not {texts['kind']!r}."
        )
    prompts, samples, reading = (given.get(key) for key in ("prompts", "samples", "reading"))
    if isinstance(prompts, str) and find is not None:
        prompts = read_prompts(find(prompts))
    if samples is not None:
        samples = Path(samples) if find is None else find(_text(samples, f"{where}: samples"))
    if not isinstance(reading or {}, Mapping):
        raise ConceptError(f"{where}: reading must be a mapping, not {reading!r}.")
    file, low = split_files(texts["file"]) if texts["file"] else (None, None)
    if file is None:
        if prompts is None:
            raise ConceptError(f"{where} has neither a file nor prompts for the base to stay on.")
        numbers = {"weight": PRESERVE_WEIGHT, **numbers}
        texts["trigger"] = texts["trigger"] or "preserve"
    return ConceptOption(
        file,
        texts["trigger"],
        texts["class"],
        **numbers,
        low=low,
        prompts=None if prompts is None else _texts(prompts, f"{where}: prompts"),
        samples=samples,
        subjects=_texts(given.get("subjects", ()), f"{where}: subjects"),
        kind=cast(PromptKind, texts["kind"] or "subject"),
        sha256=_text(given.get("sha256", ""), f"{where}: sha256"),
        reading=reading or {},
    )


def _number(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConceptError(f"{name} must be a number, not {value!r}.")
    return number


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ConceptError(f"{name} must be text, not {value!r}.")
    return str(value)


def _texts(values: Any, name: str) -> list[str]:
    if not isinstance(values, list | tuple):
        raise ConceptError(f"{name} must be a list, not {values!r}.")
    return [_text(value, name) for value in values]


def read_concepts(
    options: Sequence[ConceptOption],
    host: Host,
    reading: ReadOptions,
    renames: Sequence[str] = (),
) -> list[Concept]:
    """The concepts with their LoRAs. Where nothing says how to call for one, its file's metadata
    do, or the notes beside it.

    ``reading`` counts where a recipe has recorded no other; ``renames`` come after its own, and
    each has to fit an embedding.
    """
    concepts = [_read(option, host, reading, renames) for option in options]
    for text in renames:
        if not any(_has_new_name(text, concept.lora) for concept in concepts):
            loras = [concept.lora for concept in concepts if concept.lora is not None]
            brought = [f"{lora.name}:{name}" for lora in loras for name in lora.embeddings]
            raise UsageError(
                f"--rename {text!r} fits no embedding of these LoRAs, which bring "
                f"{', '.join(brought) or 'none'}."
            )
    return concepts


def _has_new_name(rename: str, lora: Lora | None) -> bool:
    left, _, new = rename.partition("=")
    owner = left.rpartition(":")[0]
    return lora is not None and new in lora.embeddings and owner in ("", lora.name)


def _read(
    option: ConceptOption, host: Host, reading: ReadOptions, renames: Sequence[str]
) -> Concept:
    words, lora = Words(option.trigger, option.class_word, tuple(option.subjects)), None
    if option.file is not None:
        lora = _lora(host, option.files, _reading(option, reading))
        if words == Words() and option.prompts is None:
            words = words_in(find_phrases(option.file, lora.metadata).phrases)
        again = [str(text) for text in option.reading.get("rename") or ()]
        lora = rename_embeddings(lora, [*again, *renames])
    return Concept(
        lora,
        option.prompts,
        kind=option.kind,
        **words._asdict(),
        strength=option.strength,
        text_strength=option.text_strength,
        weight=option.weight,
    )


def _reading(option: ConceptOption, reading: ReadOptions) -> ReadOptions:
    recorded = option.reading
    partial = bool(recorded.get("allow_partial")) or reading.allow_partial
    energy = _number(recorded.get("energy", reading.energy), f"{option.file}: energy")
    return ReadOptions(partial, energy)


def _lora(host: Host, files: Sequence[Path], reading: ReadOptions) -> Lora:
    """The LoRA in one file, or in two of a model with two experts: for high noise and for low."""
    high, *others = [host.read_lora(file, reading) for file in files]
    if not others:
        return high
    experts = getattr(host, "experts", None)
    if not experts:
        raise ConceptError(f"{files[1]}: the base has one denoiser; give one file for a concept.")
    return joined_experts(high, others[0], experts)


def check_renames(renames: Sequence[str]) -> None:
    """Raise :class:`IterisError` for what is no ``[LORA:]NAME=NEW``."""
    for text in renames:
        left, equals, new = text.partition("=")
        if not equals or not new or not left.rpartition(":")[2]:
            raise UsageError(f"--rename {text!r} is not LORA:NAME=NEW or NAME=NEW.")


def rename_embeddings(lora: Lora, renames: Sequence[str]) -> Lora:
    """``renames`` are LORA:NAME=NEW, or NAME=NEW for every LoRA."""
    if not renames:
        return lora
    check_renames(renames)
    names = {name: name for name in lora.embeddings}
    for text in renames:
        left, _, new = text.partition("=")
        owner, colon, old = left.rpartition(":")
        if old in names and (not colon or owner == lora.name):
            names[old] = new
    if len(set(names.values())) < len(names):
        raise UsageError(f"{lora.name}: two embeddings would have one name: {names}.")
    renamed = {names[name]: parts for name, parts in lora.embeddings.items()}
    return replace(lora, embeddings=renamed, reading={**lora.reading, "rename": list(renames)})
