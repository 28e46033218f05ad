"""Options that commands share, commands whose options are the fields of a dataclass, and
``NAME=VALUE`` settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from inspect import Parameter, Signature
from typing import Annotated, Any, Literal, TypeVar, cast, get_type_hints

import typer

from ..calibration import Calibration
from ..errors import SettingsError
from ..hosts.sample_store import NONE, SampleStore
from ..methods import all_methods, find_method
from ..settings import PresetName, Settings, declared_settings, unknown_setting

_O = TypeVar("_O")
_Run = Callable[[typer.Context, _O, dict[str, Any]], None]
Dtype = Literal["float16", "bfloat16", "float32"]

BASE, CALIBRATION, READING = "Base", "Calibration: prompts and latents", "LoRA files"
RESULT = "Result"
METHOD, AGAIN = "Method and settings", "Repeat a merge, or use a merge file"
"""Headings of the help."""
_TYPER = "typer"


def option(help: str, *names: str, panel: str | None = None, **how: Any) -> Any:
    """A typer option, by default named as the parameter, under the help's heading ``panel``."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **how)


def offered(
    help: str, *names: str, default: Any = None, panel: str | None = None, **how: Any
) -> Any:
    """A field of a dataclass of options, as :func:`option`; with ``default=...`` it is required."""
    info = typer.Option(default, *names, help=help, rich_help_panel=panel, **how)
    return field(default=default, metadata={_TYPER: info})


def argument(help: str, default: Any = ..., **how: Any) -> Any:
    """A field of a dataclass of options that is an argument; required without a ``default``."""
    return field(default=default, metadata={_TYPER: typer.Argument(default, help=help, **how)})


Device = Annotated[str | None, option("cpu, cuda, …; default: the best available", panel=BASE)]
BaseDtype = Annotated[
    Dtype | None,
    option(
        "Type of the base; on a GPU bfloat16, or float16 for a UNet, otherwise float32", panel=BASE
    ),
]
Offload = Annotated[
    Literal["model", "sequential"] | None,
    option(
        "Keep the base in host memory; only the running model, or only its running layer, is on "
        "the GPU",
        panel=BASE,
    ),
]
Memory = Annotated[
    float | None,
    option("GiB a merge may use beyond the model; default: all free memory", panel=BASE, min=0),
]
Store = Annotated[
    str | None,
    option(
        "Folder that keeps denoised samples for later merges, or none; default: iteris/samples in "
        "the user's cache",
        metavar="FOLDER",
        panel=CALIBRATION,
    ),
]
Energy = Annotated[float, option("Share to keep of changes that are not low rank", panel=READING)]
Partial = Annotated[
    bool,
    option("Leave out what a LoRA cannot represent, and list it", "--allow-partial", panel=READING),
]
Overwrite = Annotated[bool, option("Replace an existing file", "--overwrite")]
AsJson = Annotated[bool, option("Print the report as JSON", "--json", panel=RESULT)]
Preset = Annotated[
    PresetName | None,
    option(
        "fast: in a quarter of the time. best: keeps more; takes four to eight times as long. "
        "tidy: LoRAs act on triggers only. All: iteris methods"
    ),
]

CONCEPT_HELP = (
    "A LoRA and its words, as cat.safetensors:sks:cat; repeat for each LoRA. All forms are listed "
    "below"
)
CONCEPT_FORMS = """\
\b
A concept:
  FILE, FILE:0.8            a LoRA with its trigger words in its metadata
  FILE:TRIGGER:CLASS        cat.safetensors:sks:cat, in prompts "sks cat"
  FILE:TRIGGER:CLASS:0.8    at strength 0.8; 0.8/0.5: model and text encoders
  HIGH+LOW:TRIGGER:CLASS    two files, for a base with two experts
  ,weight=2                 how much it counts in the merge (1)
  ,prompts=FILE             its own prompts, one per line, not templates
  ,kind=style               templates for a style; also tags, video (subject)
  ,always_on=include        a speed LoRA: on in every merge, and in the file
  ,blocks= ,layers=*attn2*  a part of it: block weights, or names of layers
  prompts=FILE,weight=0.2   no LoRA: prompts on which the base should stay
  ,trigger= ,class= ,strength= ,text_strength=   the same by name
"""


def bytes_of(memory: float | None) -> int | Literal["free"]:
    return "free" if memory is None else round(memory * 2**30)


def store_of(folder: str | None) -> SampleStore | None:
    return None if folder == NONE else SampleStore.at(folder or SampleStore.default())


def method_names(incomplete: str) -> list[tuple[str, str]]:
    """Shell completions for a method name."""
    return [(m.name, m.summary) for m in all_methods() if m.name.startswith(incomplete)]


def setting_names(incomplete: str) -> list[tuple[str, str]]:
    """Shell completions for ``NAME=``: the settings of iteris and the calibration."""
    owners = (find_method("iteris").settings, Calibration)
    declared = [pair for owner in owners for pair in declared_settings(owner).items()]
    return [(f"{name}=", setting.help) for name, setting in declared if name.startswith(incomplete)]


def is_setting(name: str) -> bool:
    """True if a method has a setting of that name."""
    return any(name in declared_settings(method.settings) for method in all_methods())


def command(options: type[_O]) -> Callable[[_Run[_O]], Callable[..., None]]:
    """Decorator: make a function of ``(context, options, calibration)`` a typer command, with an
    option for each field of the dataclass ``options``, and one for each setting of the calibration.
    The function receives the settings that were passed, by name."""
    hints, declared = get_type_hints(options, include_extras=True), declared_settings(Calibration)
    hinted: dict[str, tuple[Any, Any]] = {"context": (typer.Context, Parameter.empty)}
    for option_field in fields(cast(Any, options)):
        name, default = option_field.name, option_field.default
        hinted[name] = hints[name], option_field.metadata.get(_TYPER, default)
    for name, setting in declared.items():
        help = f"{setting.explained()} Default: {setting.shown(setting.default)}."
        form = f"<{'|'.join(setting.choices) or setting.kind.__name__}>"
        hinted[name] = Annotated[str | None, option(help, panel=CALIBRATION, metavar=form)], None

    def decorated(run: _Run[_O]) -> Callable[..., None]:
        def called(context: typer.Context, **values: Any) -> None:
            texts = passed(**{name: values.pop(name) for name in declared})
            parsed = {name: declared[name].parse(text) for name, text in texts.items()}
            run(context, options(**values), parsed)

        called.__name__, called.__doc__ = run.__name__, run.__doc__
        called.__annotations__ = {name: hint for name, (hint, _) in hinted.items()}
        vars(called)["__signature__"] = Signature([
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            for name, (hint, default) in hinted.items()
        ])  # fmt: skip
        return called

    return decorated


def passed(**values: Any) -> dict[str, Any]:
    """The options that were passed."""
    return {name: value for name, value in values.items() if value is not None}


def parse_settings(
    kind: type[Settings], pairs: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split ``NAME=VALUE`` pairs into settings of a method, of that ``kind``, and of the
    calibration."""
    parsed: dict[type[Settings], dict[str, Any]] = {kind: {}, Calibration: {}}
    for pair in pairs:
        where, (name, equals, text) = f"--set {pair!r}", pair.partition("=")
        if not equals:
            raise SettingsError(f"{where}: write NAME=VALUE, such as rank=16.")
        owner = next((owner for owner in parsed if name in declared_settings(owner)), None)
        if owner is None:
            raise SettingsError(f"{where}: {unknown_setting(name, *parsed)}")
        parsed[owner] |= check_settings(owner, {name: text}, where)
    return parsed[kind], parsed[Calibration]


def check_settings(kind: type[Settings], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``values`` from a file, checked and parsed as after ``NAME=``; errors name ``where``."""
    checked: dict[str, Any] = {}
    for name, value in values.items():
        declared = declared_settings(kind).get(name)
        if declared is not None:
            checked[name] = declared.parse(value) if isinstance(value, str) else value
            try:
                declared.check(checked[name])
            except SettingsError as error:
                raise SettingsError(f"{where}: {error}") from None
        elif name not in kind.__dataclass_fields__:
            raise SettingsError(f"{where}: {unknown_setting(name, kind)}")
        elif isinstance(value, list):  # templates
            checked[name] = [*map(str, cast("list[Any]", value))]
        else:
            raise SettingsError(f"{where}: {name} must be a list of strings, not {value!r}.")
    return checked
