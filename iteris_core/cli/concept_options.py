"""Concepts from the command line and merge files: parses them, and finds their files."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, cast

from ..config import ConceptConfig
from ..errors import ConceptError, LoraFileError, MergeFileError, RecipeError, did_you_mean
from ..lora_files.tensors import file_digest
from .inputs import read_prompts

Find = Callable[[str], Path]
"""File name → path."""

_KEYS = ConceptConfig.key_names()[:-3]
"""Only recipes contain the last three."""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
# A path may contain colons, as in C:\loras\cat.safetensors:sks:cat.
_STRENGTHS = f"({_NUMBER})(?:/({_NUMBER}))?"
_SHORT = re.compile(f"(.+?):([^:]*):([^:]*)(?::{_STRENGTHS})?")
_WORDLESS = re.compile(rf"(.+\.safetensors)(?::{_STRENGTHS})?")
_KEY = re.compile(rf",\s*(?=(?:{'|'.join(_KEYS)})=)")
_UNKNOWN_KEY = re.compile(r",\s*([A-Za-z_]\w*)=")


def parse_concept(text: str, find: Find = Path, option: str = "--concept") -> ConceptConfig:
    """Parse FILE[:TRIGGER:CLASS][:STRENGTH[/TEXT]][,KEY=VALUE]…, where FILE may be HIGH+LOW. Error
    messages name the ``option``."""
    where = f"{option} {text!r}"
    head, *pairs = _KEY.split(f",{text}")
    head = head.removeprefix(",")
    for part in (head, *pairs):
        if unknown := _UNKNOWN_KEY.search(part):  # otherwise it would become part of the words
            raise ConceptError(
                f"{where}: there is no key {unknown[1]!r}{did_you_mean(unknown[1], _KEYS)} The "
                f"keys are {', '.join(_KEYS)}. Words with a comma and an = must go into a merge "
                "file."
            )
    split = [pair.partition("=") for pair in pairs]
    values: dict[str, Any] = {key: value for key, _, value in split}
    in_front = _short(head, bool(pairs), where) if head else {}
    keys = [*in_front, *(key for key, _, _ in split)]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ConceptError(f"{where} gives {', '.join(twice)} twice; leave one out.")
    return concept_of({**in_front, **values}, where, find)


def _short(text: str, alone: bool, where: str) -> dict[str, Any]:
    if wordless := _WORDLESS.fullmatch(text):
        keys = ("file", "strength", "text_strength")
        return {key: value for key, value in zip(keys, wordless.groups(), strict=True) if value}
    _, named, words = text.rpartition(".safetensors:")
    strength = ":".join(words.split(":")[2:])
    if named and words.count(":") > 1 and not re.fullmatch(_STRENGTHS, strength):
        raise ConceptError(
            f"{where}: the strength must be a number such as 0.8, or two such as 0.8/0.5 (model "
            f"and text encoders), not {strength!r}."
        )
    if parts := _SHORT.fullmatch(text):
        keys = ("file", "trigger", "class", "strength", "text_strength")
        return {key: value for key, value in zip(keys, parts.groups(), strict=True) if value}
    if alone and not named:
        return {"file": text}
    raise ConceptError(
        f"{where} is not FILE:TRIGGER:CLASS or FILE, if its metadata contain a trigger, with a "
        "strength behind it (:0.8, or :0.8/0.5 for model and text encoders), such as "
        "cat.safetensors:sks:cat:0.8/0.5, optionally followed by ,weight=2 or ,prompts=cat.txt; "
        "or FILE,trigger=sks without a class."
    )


def concept_of(entry: Any, where: str, find: Find = Path) -> ConceptConfig:
    """The concept of a merge file's ``entry``, a text as for :func:`parse_concept` or a mapping;
    ``find`` locates prompt files."""
    if isinstance(entry, str):
        return parse_concept(entry, find)
    if not isinstance(entry, Mapping):
        raise MergeFileError(f"{where} must be FILE:TRIGGER:CLASS or a mapping, not {entry!r}.")
    values = dict(cast(Mapping[str, Any], entry))
    if isinstance(prompts := values.get("prompts"), str):
        values["prompts"] = read_prompts(find(prompts))
    return ConceptConfig.from_dict(values, where)


def found_in(folders: Sequence[Path], concept: ConceptConfig) -> ConceptConfig:
    """``concept``, with its files looked up in ``folders``."""
    digests = concept.sha256.split("+")
    pairs = itertools.zip_longest(concept.files, digests, fillvalue="")
    files = [find_file(folders, str(name), digest) for name, digest in pairs if name]
    return concept.model_copy(update=dict(zip(("file", "low"), files, strict=False)))


def find_file(folders: Sequence[Path], name: str, digest: str) -> Path:
    """The file in one of ``folders``, by its recorded path or file name; its content must be the
    same."""
    whole = os.path.expanduser(name)
    names = dict.fromkeys((whole, PureWindowsPath(name).name))  # either kind of slash
    candidates = [folder / part for folder in folders for part in names]
    present = [path for path in candidates if path.exists()]
    for path in present:
        if not digest or (path.is_file() and file_digest(path) == digest):
            return path
    if present:
        raise RecipeError(f"{present[0]} is not the file that was merged: its SHA-256 differs.")
    places = ", ".join(str(folder) for folder in dict.fromkeys(folders[:3]))  # not subfolders
    kind = RecipeError if digest else LoraFileError  # only a recipe has a digest
    raise kind(f"{name} is not in any of the folders {places}; pass its folder with --loras.")
