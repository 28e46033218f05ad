"""What the commands' options are made from: settings, concepts, files of lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..concepts import Calibration
from ..errors import IterisError, SettingsError
from ..presets import PRESETS
from ..settings import Settings, declared_settings, find_setting
from .common import option

Latents = Literal["denoising", "noise"]
Dtype = Literal["float16", "bfloat16", "float32"]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"

PRESET_HELP = " ".join(f"{name}: {preset.help}" for name, preset in PRESETS.items())


@dataclass(frozen=True)
class ConceptOption:
    """``text_strength=None``: the same as ``strength``. ``low`` is the file for the second of two
    experts."""

    file: Path
    trigger: str = ""
    class_word: str = ""
    strength: float = 1.0
    text_strength: float | None = None
    low: Path | None = None


def split_files(text: str) -> tuple[Path, Path | None]:
    """FILE, or HIGH+LOW of a model with two experts."""
    high, plus, low = text.partition(".safetensors+")
    return (Path(f"{high}.safetensors"), Path(low)) if plus else (Path(text), None)


def calibration_option(name: str) -> Any:
    """The option of a setting of :class:`Calibration`; not given, it is left to the preset."""
    declared = declared_settings(Calibration)[name]
    return option(f"{declared.explained()} Default: {declared.shown(declared.default)}.")


def given(**values: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value is not None}


def parse_concept(text: str) -> ConceptOption:
    """FILE[:TRIGGER:CLASS[:STRENGTH[/TEXT]]], where FILE may be HIGH+LOW"""
    if text.endswith(".safetensors"):
        file, low = split_files(text)
        return ConceptOption(file, low=low)
    # A path may have colons, as in C:\loras\cat.safetensors:sks:cat.
    parts = re.fullmatch(f"(.+?):([^:]*):([^:]*)(?::({_NUMBER})(?:/({_NUMBER}))?)?", text)
    if parts is None:
        raise IterisError(
            f"--concept {text!r} is not FILE:TRIGGER:CLASS, FILE:TRIGGER:CLASS:STRENGTH or "
            "FILE:TRIGGER:CLASS:STRENGTH/TEXT (the strength of the text encoders), such as "
            "cat.safetensors:sks:cat:0.8/0.5; or FILE alone, if its metadata have a trigger."
        )
    files, trigger, class_word, model, encoders = parts.groups()
    file, low = split_files(files)
    strengths = float(model or 1), None if encoders is None else float(encoders)
    return ConceptOption(file, trigger, class_word, *strengths, low)


def parse_settings(
    kind: type[Settings], pairs: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of ``NAME=VALUE`` pairs: those of the method, whose settings are ``kind``, and
    those of the calibration."""
    values: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        owner = next((o for o in (kind, Calibration) if find_setting(o, name)), None)
        declared = find_setting(owner, name) if owner is not None else None
        if not equals or declared is None:
            names = ", ".join([*declared_settings(kind), *declared_settings(Calibration)])
            raise IterisError(f"--set {pair!r}: write NAME=VALUE; names are {names}.")
        value = declared.parse(text)
        try:
            declared.check(declared.former_values.get(str(value), value), name)
        except SettingsError as error:
            raise SettingsError(f"--set {pair!r}: {error}") from None
        values[owner is Calibration][name] = value
    return values


def read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise IterisError(f"{path} does not exist or is not a file.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]
