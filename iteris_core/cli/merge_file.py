"""Concepts and merge files from text. A merge file is YAML with every option of ``iteris merge`` as
a key, and with concepts, settings and calibration written out; relative paths are relative to it.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, cast

import typer
import yaml

from ..concepts import CONCEPT_KEYS, Concept
from ..config import MergeConfig
from ..errors import ConceptError, LoraFileError, MergeFileError, RecipeError, brief, unknown
from ..lora_files.tensors import file_digest
from .base import BUNDLED
from .inputs import read_lines

KEYS = ("base", "concepts", "settings", "calibration")
"""Keys that are not options of ``iteris merge``."""
_CONCEPT = CONCEPT_KEYS[:-3]
"""Keys of a concept; only recipes contain the last three."""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
# A path may contain colons, as in C:\loras\cat.safetensors:sks:cat.
_STRENGTHS = f"(?P<strength>{_NUMBER})(?:/(?P<text_strength>{_NUMBER}))?"
_SHORT = re.compile(f"(?P<file>.+?):(?P<trigger>[^:]*):(?P<class>[^:]*)(?::{_STRENGTHS})?")
_WORDLESS = re.compile(rf"(?P<file>.+\.safetensors)(?::{_STRENGTHS})?")
_KEY = re.compile(rf",\s*(?=(?:{'|'.join(_CONCEPT)})=)")
_UNKNOWN_KEY = re.compile(r",\s*([A-Za-z_]\w*)=")

Find = Callable[[str], Path]
"""File name → path."""


def parse_concept(text: str, find: Find = Path, option: str = "--concept") -> Concept:
    """Parse FILE[:TRIGGER:CLASS][:STRENGTH[/TEXT]][,KEY=VALUE]…, where FILE may be HIGH+LOW. Error
    messages name the ``option``."""
    where = f"{option} {text!r}"
    head, *pairs = _KEY.split(f",{text}")
    head = head.removeprefix(",")
    for part in (head, *pairs):
        if found := _UNKNOWN_KEY.search(part):  # otherwise it would become part of the words
            raise ConceptError(
                f"{where}: {unknown('key', found[1], _CONCEPT)} Words with a comma and an = must "
                "go into a merge file."
            )
    values = _short(head, bool(pairs), where) if head else {}
    for key, _, value in (pair.partition("=") for pair in pairs):
        if key in values:
            raise ConceptError(f"{where} gives {key} twice; leave one out.")
        values[key] = value
    return concept_of(values, where, find)


def _short(text: str, alone: bool, where: str) -> dict[str, str]:
    """Keys and values in a concept's text before any KEY=VALUE."""
    parts = _WORDLESS.fullmatch(text)
    if parts is None:
        _, named, words = text.rpartition(".safetensors:")
        strength = ":".join(words.split(":")[2:])
        if named and words.count(":") > 1 and not re.fullmatch(_STRENGTHS, strength):
            raise ConceptError(
                f"{where}: the strength must be a number such as 0.8, or two such as 0.8/0.5 "
                f"(model and text encoders), not {strength!r}."
            )
        parts = _SHORT.fullmatch(text)
        if parts is None and alone and not named:
            return {"file": text}
    if parts is None:
        raise ConceptError(
            f"{where} is not FILE:TRIGGER:CLASS or FILE, if its metadata contain a trigger, with a "
            "strength behind it (:0.8, or :0.8/0.5 for model and text encoders), such as "
            "cat.safetensors:sks:cat:0.8/0.5, optionally followed by ,weight=2 or "
            ",prompts=cat.txt; or FILE,trigger=sks without a class."
        )
    return {key: value for key, value in parts.groupdict().items() if value}


def concept_of(entry: Any, where: str, find: Find = Path) -> Concept:
    """The concept of a merge file's ``entry``, text or mapping; ``find`` locates prompts."""
    if isinstance(entry, str):
        return parse_concept(entry, find)
    if not isinstance(entry, Mapping):
        raise MergeFileError(f"{where} must be FILE:TRIGGER:CLASS or a mapping, not {entry!r}.")
    values = dict(cast(Mapping[str, Any], entry))
    if isinstance(prompts := values.get("prompts"), str):
        values["prompts"] = read_lines(find(prompts))
    return Concept.from_dict(values, where)


def found_in(folders: Sequence[Path], concept: Concept) -> Concept:
    """``concept``, with its files looked up in ``folders``."""
    digests = concept.sha256.split("+")
    pairs = itertools.zip_longest(concept.files, digests, fillvalue="")
    files = [find_file(folders, str(name), digest) for name, digest in pairs if name]
    return replace(concept, **dict(zip(("file", "low"), files, strict=False)))


def find_file(folders: Sequence[Path], name: str, digest: str) -> Path:
    """The file in ``folders`` of the recorded path or name, with the recorded content."""
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


def beside(file: Path, name: str) -> Path:
    """The path of ``name`` in a merge ``file``: beside it, otherwise relative to the current
    folder."""
    path = Path(os.path.expanduser(name))
    there = file.parent / path
    return there if there.exists() else path


def base_in(file: Path, base: str) -> str:
    """The path of the base in a merge ``file``; a hub name or a bundled base's stays as it is."""
    path = beside(file, base)
    return base if base in BUNDLED or not path.exists() else str(path)


def use_merge_file(context: typer.Context, base: str | None) -> str | None:
    """The base, given as BASE or in a merge file. The file's options become defaults; its path and
    the merge that its other keys request go into ``context.obj``."""
    if base is None or context.resilient_parsing or Path(base).suffix not in (".yaml", ".yml"):
        return base
    path = Path(base)
    data = read_mapping(path)
    request = {key: data.pop(key) for key in KEYS if key in data}
    name, entries = request.pop("base", None), request.pop("concepts", None) or []
    if not isinstance(entries, list):
        raise MergeFileError(f"{path}: concepts must be a list, not {entries!r}.")
    request["concepts"] = tuple(
        concept_of(entry, f"{path}: concept {number}", partial(beside, path))
        for number, entry in enumerate(cast("list[Any]", entries), 1)
    )
    context.obj = path, MergeConfig.from_dict(request, str(path))
    context.default_map = _defaults(context, path, data)
    return None if name is None else base_in(path, str(name))


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that refuses duplicate keys, of which the later one would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if next(first for first in keys if first.value == key.value) is not key:
                what = f"the key {key.value!r} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
        return super().construct_mapping(node, deep=deep)


def read_mapping(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise MergeFileError(f"{path} does not exist or is not a file; check the path.")
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except OSError as error:
        raise MergeFileError(f"{path} cannot be read ({brief(error)}).") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise MergeFileError(f"{path} is not valid YAML: {brief(error)}") from error
    if data is None:
        raise MergeFileError(f"{path} is empty; write base:, output: and concepts: into it.")
    if not isinstance(data, dict):
        raise MergeFileError(f"{path}: the file must be a mapping of names to values, not {data!r}")
    return data


def _defaults(context: typer.Context, file: Path, values: Mapping[Any, Any]) -> dict[str, Any]:
    """Parameter → value, converted as on the command line; an error names the file and the key."""
    parameters = keys_of(context.command)
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        parameter = parameters.get(str(key))
        if parameter is None:
            raise MergeFileError(f"{file}: {unknown('key', key, [*KEYS, *parameters])}")
        if value is None:
            continue
        if not isinstance(value, bool):  # as on the command line, where flags are flags too
            value = [*map(str, value)] if isinstance(value, list) else str(value)
        try:
            converted = parameter.process_value(context, value)
        except typer.BadParameter as error:
            raise MergeFileError(f"{file}: {key}: {error.message}") from error
        if isinstance(converted, Path):
            target = parameter.name == "output"
            there = file.parent / os.path.expanduser(converted)
            converted = there if target else beside(file, str(converted))
        defaults[parameter.name] = converted
    return defaults


def keys_of(command: Any) -> dict[str, Any]:
    """Key → the option of a typer ``command`` with that long name, with underscores."""
    longest = {max(option.opts, key=len): option for option in command.params}
    return {
        name[2:].replace("-", "_"): option
        for name, option in longest.items()
        if name.startswith("--") and name not in ("--help", "--set", "--concept")
    }
