"""Command options, from dataclass fields and settings; and reading the text files that they
name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_type_hints

import typer

from ..concepts import Calibration, lines_of
from ..errors import InputFileError, IterisError, SettingsError, did_you_mean
from ..methods import all_methods, find_method
from ..settings import Setting, Settings, declared_settings
from .common import console, option

OPTION, SETTINGS = "option", "settings"
"""Keys of a field's metadata: its option, and its settings' options by name."""
MOST_PROMPTS = 2000
"""Most prompts read from one file; far more than a concept uses."""

_O = TypeVar("_O")
Dtype = Literal["float16", "bfloat16", "float32"]

PRESET_HELP = (
    "fast: a quarter of the prompts. best: for a low rank or many LoRAs; 6 to 7 times as long. "
    "tidy: LoRAs act on triggers only. All: iteris methods"
)

CONCEPT_HELP = (
    "A LoRA and its words, as cat.safetensors:sks:cat; repeat for each LoRA. All forms are listed "
    "below"
)
CONCEPT_FORMS = """\
\b
A concept:
  FILE                      a LoRA with its trigger words in its metadata
  FILE:TRIGGER:CLASS        cat.safetensors:sks:cat, in prompts "sks cat"
  FILE:TRIGGER:CLASS:0.8    at strength 0.8; 0.8/0.5: model and text encoders
  HIGH+LOW:TRIGGER:CLASS    two files, for a base with two experts
  FOLDER:SAMPLES[:0.8]      a peft adapter for a transformers model
  ,weight=2                 how much it counts in the merge (1)
  ,prompts=FILE             its own prompts, one per line, not templates
  ,kind=style               templates for a style; also tags, video (subject)
  ,always_on=include        a speed LoRA: on in every merge, and in the file
  ,blocks= ,layers=*attn2*  a part of it: block weights, or names of layers
  ,trigger= ,class= ,strength= ,text_strength= ,samples=   the same by name
"""


def method_names(incomplete: str) -> list[tuple[str, str]]:
    """Shell completions for a method name."""
    return [(m.name, m.summary) for m in all_methods() if m.name.startswith(incomplete)]


def setting_names(incomplete: str) -> list[tuple[str, str]]:
    """Shell completions for ``NAME=``: the settings of iteris and the calibration."""
    owners = (find_method("iteris").settings, Calibration)
    declared = {name: one for owner in owners for name, one in declared_settings(owner).items()}
    return [(f"{n}=", one.help) for n, one in declared.items() if n.startswith(incomplete)]


def is_setting(name: str) -> bool:
    """True if a method has a setting of that name."""
    return any(name in declared_settings(method.settings) for method in all_methods())


def settings_of(kind: type[Settings], panel: str, *names: str) -> Any:
    """A field that holds the given settings of ``kind`` by name. Each setting is an option of its
    own; ``names`` restricts them."""
    declared = {n: one for n, one in declared_settings(kind).items() if not names or n in names}
    return field(default_factory=dict[str, Any], metadata={SETTINGS: (kind, panel, declared)})


def _setting_option(kind: type[Settings], panel: str, declared: Setting) -> Any:
    """The hint of a setting's option. Words such as ``none`` are parsed later."""
    help = f"{declared.explained()} Default: {declared.shown(declared.default)}."
    if declared.optional:
        return Annotated[
            str | None, option(help, panel=panel, metavar=f"<{declared.kind.__name__}>")
        ]
    return Annotated[get_type_hints(kind)[declared.name] | None, option(help, panel=panel)]


def given_by(help: str, *names: str, default: Any = None, **more: Any) -> Any:
    """A field whose option comes from :func:`.common.option`."""
    return field(default=default, metadata={OPTION: option(help, *names, **more)})


def command(kind: type[_O]) -> Callable[[Callable[[typer.Context, _O], None]], Callable[..., None]]:
    """Decorator: make a function a typer command, with an option for each field of the dataclass
    ``kind``, and for each setting of a :func:`settings_of` field."""
    hinted: dict[str, tuple[Any, Any]] = {"context": (typer.Context, MISSING)}
    hints = get_type_hints(kind, include_extras=True)
    settings = {
        f.name: f.metadata[SETTINGS] for f in fields(cast(Any, kind)) if SETTINGS in f.metadata
    }
    for one in fields(cast(Any, kind)):
        if one.name in settings:
            owner, panel, declared = settings[one.name]
            hinted |= {n: (_setting_option(owner, panel, s), None) for n, s in declared.items()}
        else:
            hint, extra = hints[one.name], one.metadata.get(OPTION)
            hinted[one.name] = hint if extra is None else Annotated[hint, extra], one.default

    def made(run: Callable[[typer.Context, _O], None]) -> Callable[..., None]:
        def called(context: typer.Context, **values: Any) -> None:
            for field_name, (_, _, declared) in settings.items():
                found = given(**{name: values.pop(name) for name in declared})
                values[field_name] = {
                    name: declared[name].parse(value) if isinstance(value, str) else value
                    for name, value in found.items()
                }
            run(context, kind(**values))

        called.__name__, called.__doc__ = run.__name__, run.__doc__
        called.__annotations__ = {name: hint for name, (hint, _) in hinted.items()}
        defaults = {n: Parameter.empty if d is MISSING else d for n, (_, d) in hinted.items()}
        parameters = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint)
            for name, (hint, _) in hinted.items()
        ]
        vars(called)["__signature__"] = Signature(parameters)
        return called

    return made


def given(**values: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value is not None}


def parse_settings(
    kind: type[Settings], pairs: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split ``NAME=VALUE`` pairs into settings of the method, which are ``kind``, and of the
    calibration."""
    values, calibration = parse_by_method({"": kind}, pairs)
    return values[""], calibration


def parse_by_method(
    kinds: Mapping[str, type[Settings]], pairs: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Split ``[METHOD.]NAME=VALUE`` pairs into settings of each method and of the calibration.
    Without METHOD, a setting applies to every method that has it."""
    values: dict[str, dict[str, Any]] = {method: {} for method in kinds}
    calibration: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        where = f"--set {pair!r}"
        if not equals:
            raise SettingsError(f"{where}: write NAME=VALUE, such as rank=16.")
        method, dot, rest = name.partition(".")
        among = kinds
        if dot and method in kinds:
            among, name = {method: kinds[method]}, rest
        owners = {m: kind for m, kind in among.items() if name in declared_settings(kind)}
        for owner, kind in owners.items():
            values[owner][name] = _value(kind, name, text, where)
        if owners:
            continue
        if name in declared_settings(Calibration) and among is kinds:
            calibration[name] = _value(Calibration, name, text, where)
        elif dot and among is kinds and "" not in kinds:
            raise SettingsError(
                f"{where}: {method!r} is not among the methods to compare, which are "
                f"{', '.join(kinds)}."
            )
        else:
            known = [n for kind in (*among.values(), Calibration) for n in declared_settings(kind)]
            raise _unknown(where, name, known)
    return values, calibration


def _unknown(where: str, name: str, known: Iterable[str]) -> IterisError:
    return SettingsError(
        f"{where}: there is no setting {name!r}{did_you_mean(name, known)} iteris methods METHOD "
        "lists a method's settings."
    )


def check_settings(kind: type[Settings], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``values`` from a file, checked; strings are parsed as after ``NAME=``. Error messages use
    ``where`` to name the file."""
    for name in values:
        if name not in kind.__dataclass_fields__:
            raise _unknown(where, str(name), declared_settings(kind))
    return {name: _value(kind, name, value, where) for name, value in values.items()}


def _value(kind: type[Settings], name: str, value: Any, where: str) -> Any:
    declared = declared_settings(kind).get(name)
    if declared is None:  # templates
        if not isinstance(value, list):
            raise SettingsError(f"{where}: {name} must be a list of strings, not {value!r}.")
        return [str(one) for one in cast("list[Any]", value)]
    value = declared.parse(value) if isinstance(value, str) else value
    try:
        declared.check(value)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from None
    return value


def read_prompts(path: Path) -> list[str]:
    """The lines of a prompt file. A very long file is thinned out evenly, because a merged file's
    metadata record every prompt that it may use."""
    lines = read_lines(path)
    if len(lines) <= MOST_PROMPTS:
        return lines
    chosen = [lines[index * len(lines) // MOST_PROMPTS] for index in range(MOST_PROMPTS)]
    console.print(
        f"{path} has {len(lines)} prompts; using {MOST_PROMPTS} of them, evenly spread.",
        style="yellow", markup=False, highlight=False,
    )  # fmt: skip
    return chosen


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, stripped, without empty ones."""
    if not path.is_file():
        raise InputFileError(f"{path} does not exist or is not a file.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputFileError(
            f"{path} is not text in UTF-8 (byte {error.start}); save it again as UTF-8."
        ) from error
    if "\0" in text:
        raise InputFileError(f"{path} is not a text file: it contains null bytes.")
    return lines_of(text)
