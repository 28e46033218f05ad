"""What the commands' options are made from: settings, and files of lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..concepts import Calibration
from ..errors import InputFileError, IterisError, SettingsError, did_you_mean
from ..methods import all_methods, find_method
from ..settings import Settings, declared_settings
from .common import CALIBRATION, console, option

MOST_PROMPTS = 2000
"""Of one file; far more than are drawn for a concept."""

Latents = Literal["denoising", "noise"]
Dtype = Literal["float16", "bfloat16", "float32"]

PRESET_HELP = (
    "fast: a quarter of the prompts. best: for several concepts in one picture, many LoRAs or a "
    "low rank; six to seven times as long. paper: the paper's Algorithm 1 to the letter. More: "
    "iteris methods"
)

CONCEPT_HELP = (
    "A LoRA and what calls for it, such as cat.safetensors:sks:cat; once for each LoRA. All forms "
    "are below"
)


def method_names(incomplete: str) -> list[tuple[str, str]]:
    """What a shell completes the name of a method to."""
    return [(m.name, m.summary) for m in all_methods() if m.name.startswith(incomplete)]


def setting_names(incomplete: str) -> list[tuple[str, str]]:
    """What a shell completes ``NAME=`` to: the settings of iteris and of the calibration."""
    owners = (find_method("iteris").settings, Calibration)
    declared = {name: one for owner in owners for name, one in declared_settings(owner).items()}
    return [(f"{n}=", one.help) for n, one in declared.items() if n.startswith(incomplete)]


def calibration_option(name: str) -> Any:
    """The option of a setting of :class:`Calibration`; not given, it is left to the preset."""
    declared = declared_settings(Calibration)[name]
    default = declared.shown(declared.default)
    return option(f"{declared.explained()} Default: {default}.", panel=CALIBRATION)


def given(**values: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value is not None}


def parse_settings(
    kind: type[Settings], pairs: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of ``NAME=VALUE`` pairs: those of the method, whose settings are ``kind``, and
    those of the calibration."""
    values: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        owner = next((o for o in (kind, Calibration) if name in declared_settings(o)), None)
        known = [*declared_settings(kind), *declared_settings(Calibration)]
        if not equals:
            raise SettingsError(f"--set {pair!r}: write NAME=VALUE, such as rank=16.")
        if owner is None:
            raise _unknown(pair, name, known)
        values[owner is Calibration][name] = _value(owner, name, text, f"--set {pair!r}")
    return values


def parse_by_method(
    kinds: Mapping[str, type[Settings]], pairs: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The values of ``[METHOD.]NAME=VALUE`` pairs: those of each method, and those of the
    calibration. Without METHOD a setting is of every method that has it."""
    values: dict[str, dict[str, Any]] = {method: {} for method in kinds}
    calibration: dict[str, Any] = {}
    for pair in pairs:
        method, dot, rest = pair.partition("=")[0].partition(".")
        if dot and method in kinds:
            text = pair.partition(".")[2]
            values[method] |= parse_settings(kinds[method], [text])[0]
            continue
        name = method if not dot else f"{method}.{rest}"
        owners = [one for one, kind in kinds.items() if name in declared_settings(kind)]
        for one in owners:
            values[one] |= parse_settings(kinds[one], [pair])[0]
        if owners:
            continue
        if name in declared_settings(Calibration):
            calibration |= parse_settings(Settings, [pair])[1]
        elif dot:
            raise SettingsError(
                f"--set {pair!r}: {method!r} is not among the methods to compare, which are "
                f"{', '.join(kinds)}."
            )
        else:
            known = [
                one for kind in (*kinds.values(), Calibration) for one in declared_settings(kind)
            ]
            raise _unknown(pair, name, known)
    return values, calibration


def _unknown(pair: str, name: str, known: Sequence[str]) -> IterisError:
    return SettingsError(
        f"--set {pair!r}: there is no setting {name!r}{did_you_mean(name, known)} iteris methods "
        "METHOD lists those of a method."
    )


def check_settings(kind: type[Settings], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``values`` of a file, of which what is text is read as after ``NAME=``; ``where`` is what an
    error says of them."""
    for name in values:
        if name not in declared_settings(kind):
            guess = did_you_mean(str(name), declared_settings(kind))
            raise SettingsError(
                f"{where}: there is no setting {name!r}{guess} iteris methods METHOD lists those "
                "of a method."
            )
    return {name: _value(kind, name, value, where) for name, value in values.items()}


def _value(kind: type[Settings], name: str, value: Any, where: str) -> Any:
    declared = declared_settings(kind)[name]
    value = declared.parse(value) if isinstance(value, str) else value
    try:
        declared.check(value)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from None
    return value


def read_prompts(path: Path) -> list[str]:
    """The lines of a file of prompts; of very many some, evenly spread, since every prompt that a
    merge may draw goes into the metadata of its file."""
    lines = read_lines(path)
    if len(lines) <= MOST_PROMPTS:
        return lines
    chosen = [lines[index * len(lines) // MOST_PROMPTS] for index in range(MOST_PROMPTS)]
    console.print(
        f"{path} has {len(lines)} prompts: {MOST_PROMPTS} of them, evenly spread, are used.",
        style="yellow", markup=False, highlight=False,
    )  # fmt: skip
    return chosen


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, without blanks around them and without empty ones."""
    if not path.is_file():
        raise InputFileError(f"{path} does not exist or is not a file.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputFileError(
            f"{path} is no text in UTF-8 (byte {error.start}); save it again as UTF-8."
        ) from error
    if "\0" in text:
        raise InputFileError(f"{path} is no text file: it has bytes of 0 in it.")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line]
