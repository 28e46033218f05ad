"""Types, inputs and texts that the nodes' schemas share."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, get_args

import folder_paths
from comfy_api.latest import io

from ..iteris_core.calibration import Calibration
from ..iteris_core.errors import IterisError, with_options
from ..iteris_core.methods import all_methods
from ..iteris_core.settings import PRESETS, PresetName, Settings, declared_settings
from .comfy_internals import missing, sentence

_LOCALES = Path(__file__).parents[1] / "locales"
_TEXTS = json.loads((_LOCALES / "en" / "nodeDefs.json").read_text(encoding="utf-8"))

Concepts = io.Custom("ITERIS_CONCEPTS")
MergeSettings = io.Custom("ITERIS_SETTINGS")
Scorer = io.Custom("ITERIS_SCORER")
"""A function that returns a scorer: the toybox's is loaded when it is used."""
LoraModel = io.Custom("LORA_MODEL")
LoraStack = io.Custom("LORA_STACK")

METHOD = "iteris"
"""The default method."""
MINUTES = 60.0
"""How long a merge takes at most, unless told otherwise: roughly."""
NONE = "none"
"""The choice for no file in a node's list."""
MERGED = ("MODEL", "CLIP", "lora", "report")
"""Outputs of a node that makes a LoRA and applies it."""
_OUTPUTS: Mapping[str, Any] = {
    **dict.fromkeys(("MODEL", "MODEL low"), io.Model),
    **dict.fromkeys(("lora", "lora low"), LoraModel),
    **dict.fromkeys(("plot", "sheet", "references"), io.Image),
    **dict.fromkeys(("cosine", "clip_score"), io.Float),
    **{"CLIP": io.Clip, "VAE": io.Vae},
    **{"concepts": Concepts, "settings": MergeSettings, "scorer": Scorer},
}
"""Output → its type; all others are text."""


def concepts_input(*, optional: bool = False) -> Any:
    """Accepts this pack's concepts and other packs' LORA_STACKs."""
    types = [Concepts, LoraStack]
    return io.MultiType.Input("concepts", types=types, optional=optional)


def strength_input(name: str, **more: Any) -> Any:
    return io.Float.Input(name, **{"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05, **more})


def weight_input(name: str = "weight", **more: Any) -> Any:
    return io.Float.Input(name, **{"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.05, **more})


def advanced(one: Any) -> Any:
    """An input that the front end folds away; in 0.8.0 this is not a constructor argument."""
    one.extra_dict = {**one.extra_dict, "advanced": True}
    return one


def discreet(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The ``node``, whose errors now name files as ComfyUI lists them, not where they are on the
    server, options as inputs, and what this ComfyUI lacks."""
    run: Any = node.execute

    @wraps(run.__func__)
    def execute(cls: type[io.ComfyNode], *given: Any, **values: Any) -> Any:
        try:
            return run.__func__(cls, *given, **values)
        except IterisError as error:
            error.args = (discreetly(error),)
            raise
        except (AttributeError, ImportError) as error:
            if gone := missing():
                raise IterisError(sentence(gone)) from error
            raise

    node.execute = classmethod(execute)
    return node


_INPUTS = {
    "base": "connect MODEL and CLIP",
    "allow_partial": "cannot_merge: skip on IterIS Settings",
    "unmergeable": "cannot_merge on IterIS Settings",
    "denoising_steps": "denoising_steps on IterIS Settings",
}
"""Option of the library → the input that sets it."""


def discreetly(error: IterisError) -> str:
    """Its message, with files as ComfyUI lists them and the library's options as inputs."""
    text = _without_folders(str(error))
    return with_options(text, lambda name: _INPUTS.get(name, f"option {name}"))


def _without_folders(text: str) -> str:
    known = folder_paths.folder_names_and_paths.values()
    folders = {f"{folder}{os.sep}" for paths, *_ in known for folder in paths}
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(folder, "")
    return text


def schema(
    node_id: str,
    aliases: list[str],
    inputs: list[Any],
    outputs: Sequence[str],
    group: str = "",
    *,
    lists: Container[str] = (),
    hidden: Sequence[Any] = (),
    **more: Any,
) -> io.Schema:
    """A schema in the pack's category, or its ``group``; ``aliases`` are search terms, in versions
    that support them. ``lists`` names the ``outputs`` that are lists.

    Texts come from ``locales/en``, except tooltips derived from settings and methods.
    """
    texts = _TEXTS[node_id]
    for one in inputs:
        first = re.sub(r"_\d+$", "_1", one.id)  # for the rows of a node
        one.tooltip = one.tooltip or texts["inputs"][first]["tooltip"]
    made = [
        _OUTPUTS.get(name, io.String).Output(
            display_name=name,
            tooltip=texts["outputs"][str(number)]["tooltip"],
            is_output_list=name in lists,
        )
        for number, name in enumerate(outputs)
    ]
    if "search_aliases" in io.Schema.__dataclass_fields__:
        more["search_aliases"] = aliases
    return io.Schema(
        node_id=node_id,
        display_name=texts["display_name"],
        category=f"IterIS/{group}".rstrip("/"),
        description=texts["description"],
        inputs=inputs,
        outputs=made,
        hidden=[io.Hidden.unique_id, *hidden],
        **more,
    )


_NONE: Mapping[str, float] = {"saliency": -1, "contexts": -1, "steps": -1}
"""Setting → the value that means none, if 0 has another meaning."""


BY_PRESET: Mapping[str, int] = {"rank": -1, "steps": -1}
"""Setting → the value that leaves it to the preset, where 0 is to override one."""


def setting_input(owner: type[Settings], name: str) -> Any:
    """The input of a setting, with its limits and help."""
    declared = declared_settings(owner)[name]
    none = _NONE.get(name, 0)
    default = none if declared.default is None else declared.default
    means = {none: declared.none} if declared.none else {}
    if name in BY_PRESET:
        default = BY_PRESET[name]
        own = [f"{p} {s.settings[name]}" for p, s in PRESETS.items() if name in s.settings]
        by_preset = f"set by the preset ({', '.join(own)})"
        means[default] = f"{by_preset}; otherwise {means[none]}" if none == default else by_preset
    tooltip = " ".join([declared.help, *(f"{value}: {what}." for value, what in means.items())])
    shared: dict[str, Any] = {"default": default, "tooltip": tooltip, "optional": True}
    if declared.kind is bool:
        return io.Boolean.Input(name, **shared)
    if declared.kind is str:
        return io.Combo.Input(name, options=list(declared.choices), **shared)
    shared |= {
        "default": declared.kind(default),
        "min": declared.kind(BY_PRESET.get(name, none if declared.optional else declared.low or 0)),
        "max": declared.kind(declared.most or declared.high or 1),
    }
    if declared.kind is int:
        return io.Int.Input(name, **shared, control_after_generate=False)
    return io.Float.Input(name, **shared, step=declared.step or 0.05, round=False)


def changed(
    owner: type[Settings], values: Mapping[str, Any], preset: PresetName = "default"
) -> dict[str, Any]:
    """The values that are not the settings' defaults or, of :data:`BY_PRESET`, not the preset's;
    None for the one that means none."""
    given: dict[str, Any] = {}
    for name, value in values.items():
        declared = declared_settings(owner)[name]
        default = declared.default
        if name in BY_PRESET:
            default = PRESETS[preset].settings.get(name, default)
            if value == BY_PRESET[name]:
                continue
        value = None if declared.optional and value == _NONE.get(name, 0) else value
        if value != default:
            given[name] = value
    return given


def model_inputs(*, needed: bool = True) -> list[Any]:
    """MODEL, CLIP and concepts; MODEL is not ``needed`` where nothing may run it."""
    model = io.Model.Input("model", optional=not needed)
    return [model, io.Clip.Input("clip", optional=True), concepts_input()]


def sampling_inputs() -> list[Any]:
    """Samples and seed. 0 samples leave the number to the preset; any explicit number counts."""
    declared = declared_settings(Calibration)["samples"]
    numbers = {p: PRESETS[p].calibration.get("samples", declared.default) for p in PRESETS}
    by_preset = ", ".join(f"{preset} {number}" for preset, number in numbers.items())
    samples = io.Int.Input(
        "samples",
        default=0,
        min=0,
        max=declared.most,
        tooltip=f"{declared.help} 0: set by the preset ({by_preset}), fewer each with more than "
        "five LoRAs.",
        optional=True,
        control_after_generate=False,
    )
    return [samples, setting_input(Calibration, "seed")]


def preset_input() -> Any:
    helps = " ".join(f"{name}: {PRESETS[name].help}" for name in get_args(PresetName))
    return io.Combo.Input(
        "preset",
        options=list(PRESETS),
        default="default",
        optional=True,
        tooltip=f"{helps} Inputs that you change override it.",
    )


def method_names() -> list[str]:
    """All methods, the default first."""
    return sorted((method.name for method in all_methods()), key=lambda name: name != METHOD)


def minutes_input() -> Any:
    return io.Float.Input("minutes", default=MINUTES, min=0.0, max=1440.0, step=1.0, optional=True)


def method_inputs(*further: Any) -> list[Any]:
    """Preset and rows, the ``further`` inputs, minutes, the method, and those besides the
    prompts."""
    method = io.Combo.Input("method", options=method_names(), default=METHOD, optional=True)
    rows = [preset_input(), *sampling_inputs()]
    return [*rows, *further, minutes_input(), advanced(method), *beside_inputs()]


def beside_inputs() -> list[Any]:
    """Inputs besides the prompts, and the settings."""
    return [
        io.Conditioning.Input("conditioning", optional=True),
        io.Latent.Input("latent", optional=True),
        MergeSettings.Input("settings", optional=True),
    ]
