"""A merge file: YAML with every option of ``iteris merge`` as a key, and with concepts, settings
and calibration written out. Relative paths are relative to the file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import typer
import yaml

from ..config import MergeConfig
from ..errors import MergeFileError, brief, did_you_mean
from .base import BUNDLED

SUFFIXES = (".yaml", ".yml")
KEYS = ("base", "concepts", "settings", "calibration")
"""Keys that are not options of ``iteris merge``."""


@dataclass(frozen=True)
class MergeFile:
    """A merge file without its base and options, which become those of the command line.
    ``entries`` are its concepts."""

    path: Path
    entries: Sequence[Any] = ()
    config: MergeConfig = MergeConfig()

    def find(self, name: str) -> Path:
        """The path of a file: beside the merge file, otherwise relative to the current folder."""
        path = Path(os.path.expanduser(name))
        beside = self.path.parent / path
        return beside if beside.exists() else path

    def place(self, base: str) -> str:
        """The path of the base; a hub name or a bundled base's stays as it is."""
        path = self.find(base)
        return base if base in BUNDLED or not path.exists() else str(path)


def use_merge_file(context: typer.Context, base: str | None) -> str | None:
    """The base given as BASE or in a merge file. The other keys of a merge file become defaults of
    the options."""
    if base is None or context.resilient_parsing or Path(base).suffix not in SUFFIXES:
        return base
    path = Path(base)
    data = read_mapping(path)
    own = {key: data.pop(key) for key in KEYS if key in data}
    name, entries = own.pop("base", None), own.pop("concepts", None) or []
    if not isinstance(entries, list):
        raise MergeFileError(f"{path}: concepts must be a list, not {entries!r}.")
    file = MergeFile(path, cast(list[Any], entries), MergeConfig.from_dict(own, str(path)))
    context.obj = file
    context.default_map = _defaults(context, file, data)
    return None if name is None else file.place(str(name))


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that refuses duplicate keys; otherwise the later one would silently
    win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice", key.start_mark
                )
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
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
        raise MergeFileError(f"{path} is empty; iteris init FOLDER writes one for your LoRAs.")
    if not isinstance(data, dict):
        raise MergeFileError(f"{path}: the file must be a mapping of names to values, not {data!r}")
    return data


def _defaults(context: typer.Context, file: MergeFile, values: Mapping[Any, Any]) -> dict[str, Any]:
    """Parameter → value, converted as on the command line; an error names the file and the key."""
    parameters = keys_of(context.command)
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        parameter = parameters.get(str(key))
        if parameter is None:
            known = [*KEYS, *parameters]
            raise MergeFileError(
                f"{file.path}: there is no key {key!r}{did_you_mean(str(key), known)} The keys are "
                f"{', '.join(known)}."
            )
        if value is None:
            continue
        # As on the command line, where flags are flags too.
        text = [str(one) for one in value] if isinstance(value, list) else str(value)
        try:
            converted = parameter.process_value(context, value if isinstance(value, bool) else text)
        except typer.BadParameter as error:
            raise MergeFileError(f"{file.path}: {key}: {error.message}") from error
        if isinstance(converted, Path):
            target = parameter.name == "output"
            beside = file.path.parent / os.path.expanduser(converted)
            converted = beside if target else file.find(str(converted))
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
