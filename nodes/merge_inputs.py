"""Inputs that the merging nodes share, made from the settings' own declarations.

Those of the advanced group are folded in the front end. A number cannot be none there: 0 stands
for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from comfy_api.latest import io

from ..iteris_core.concepts import Calibration
from ..iteris_core.lora_files import DTYPES
from ..iteris_core.lora_files.purposes import is_fast
from ..iteris_core.merge import Unmergeable
from ..iteris_core.methods.iteris_settings import IterisSettings
from ..iteris_core.presets import PRESETS, PresetName, preset_settings
from ..iteris_core.settings import Settings, declared_settings
from .comfy_conds import References
from .schema import Concepts, advanced


def setting_input(owner: type[Settings], name: str, *, optional: bool = False) -> Any:
    """The input of a setting; ``optional`` ones have come later than graphs that were saved."""
    declared = declared_settings(owner)[name]
    tooltip = f"{declared.help} 0: {declared.none}." if declared.none else declared.help
    default = 0 if declared.default is None else declared.default
    if declared.kind is bool:
        return io.Boolean.Input(name, default=default, tooltip=tooltip)
    if declared.kind is str:
        return io.Combo.Input(
            name, options=list(declared.choices), default=default, tooltip=tooltip
        )
    limits = {
        "default": declared.kind(default),
        "min": declared.kind(0 if declared.optional else declared.low or 0),
        "max": declared.kind(declared.most or declared.high or 1),
        "tooltip": tooltip,
        "optional": optional,
    }
    if declared.kind is int:
        return io.Int.Input(name, **limits, control_after_generate=False)
    return io.Float.Input(name, **limits, step=declared.step or 0.05, round=False)


def changed(owner: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not the settings' defaults, 0 as none where that is meant."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        declared = declared_settings(owner)[name]
        value = None if declared.optional and value == 0 else value
        if value != declared.default:
            found[name] = value
    return found


def calibration_of(values: Mapping[str, Any], preset: PresetName = "default") -> Calibration:
    """What the inputs say over what the preset says."""
    given = {**PRESETS[preset].calibration, **changed(Calibration, values)}
    return Calibration.from_mapping(given)


def settings_of(method: str, values: Mapping[str, Any], preset: PresetName) -> dict[str, Any]:
    """``values`` are of ``iteris``; of them, other methods take the rank alone. ComfyUI cannot
    polish, so a preset does not either."""
    if method != "iteris":
        values = {"rank": values["rank"]}
    settings = {**preset_settings(preset, method), **changed(IterisSettings, values)}
    settings.pop("polish_steps", None)
    return settings


def left_out(method: str, preset: PresetName) -> str:
    """What a report has to say of the preset."""
    if preset_settings(preset, method).get("polish_steps"):
        return f"\n  Without the polish of the preset {preset}: ComfyUI keeps no gradients."
    return ""


def model_inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The base model; it is only run, never changed."),
        io.Clip.Input("clip", tooltip="The base model's text encoders."),
        Concepts.Input("concepts", tooltip="What is to be merged: two concepts or more."),
    ]


def sampling_inputs() -> list[Any]:
    return [setting_input(Calibration, name) for name in ("samples", "seed")]


def latent_inputs() -> list[Any]:
    return advanced(
        setting_input(Calibration, "timesteps"),
        setting_input(Calibration, "latent_size"),
        setting_input(Calibration, "latents"),
    )


def advanced_inputs() -> list[Any]:
    return advanced(
        *(
            setting_input(IterisSettings, name)
            for name in ("schedule", "ridge", "weighting", "repair")
        ),
        *latent_inputs(),
        setting_input(IterisSettings, "rank"),
        io.Combo.Input(
            "dtype",
            options=list(DTYPES),
            default="float16",
            tooltip="Precision of the merged LoRA.",
        ),
    )


def preset_input() -> Any:
    """Optional and last: graphs that were saved without it keep the places of their values."""
    helps = " ".join(f"{name}: {PRESETS[name].help}" for name in get_args(PresetName))
    return io.Combo.Input(
        "preset",
        options=list(PRESETS),
        default="default",
        optional=True,
        tooltip=f"{helps} Inputs that you change go over it. The figures are the toybox's.",
    )


def memory_inputs() -> list[Any]:
    return advanced(
        io.Float.Input(
            "memory",
            default=0.0,
            min=0.0,
            max=1024.0,
            step=0.1,
            optional=True,
            tooltip="GiB that the merge may take beyond the model. 0 takes what is free. Where "
            "that is not enough for all samples, some are left out, and the report says so.",
        ),
    )


def extra_inputs() -> list[Any]:
    """What goes beside the prompts, and what is to be done where something cannot be merged."""
    return [
        *advanced(
            setting_input(Calibration, "frames", optional=True),
            io.Combo.Input(
                "empty_prompts",
                options=["auto", "yes", "no"],
                default="auto",
                optional=True,
                tooltip="Whether some rows get the empty prompt, as they do where guidance is "
                "above 1. auto: no for models that are run without guidance: those that take it as "
                "an input (FLUX), have a sampling of LCM, or are called turbo, lightning and the "
                "like, they or a LoRA on MODEL.",
            ),
            io.Combo.Input(
                "cannot_merge",
                options=list(get_args(Unmergeable)),
                default="refuse",
                optional=True,
                tooltip="What is done with layers that cannot be merged, which is found before the "
                "merge begins: names that the model does not know, layers that nothing reaches or "
                "that mix the batch. refuse: stop and say which. skip: go on without them, and "
                "list them in the report. mean: give them the mean of the LoRAs' changes.",
            ),
        ),
        io.Conditioning.Input(
            "conditioning",
            optional=True,
            tooltip="For models that edit, fill in or go on from a picture: a CONDITIONING with "
            "the reference, first frame, mask or control. Its text is not used; the rest goes "
            "beside every prompt.",
        ),
        io.Latent.Input(
            "latent",
            optional=True,
            tooltip="A LATENT whose size and frames are taken, in place of latent_size and frames; "
            "with a mask, only what it covers is denoised.",
        ),
    ]


@dataclass(frozen=True)
class Extras:
    """What the inputs of :func:`extra_inputs` ask for: ``options`` of the merge, and a ``note``
    that the report ends with."""

    options: Mapping[str, Any]
    note: str = ""

    @classmethod
    def of(
        cls,
        files: Sequence[str],
        empty_prompts: str = "auto",
        cannot_merge: Unmergeable = "refuse",
        conditioning: Any = None,
        latent: Any = None,
    ) -> Extras:
        """``files`` are the names of those behind MODEL, which may say that it is run without
        guidance."""
        distilled = {"yes": False, "no": True}.get(empty_prompts)
        note, name = "", is_fast(files) if empty_prompts == "auto" else ""
        if name:
            distilled = True
            note = (
                f"\n  Without empty prompts: by its name {name} draws in few steps, without "
                "guidance. If you use guidance, set empty_prompts to yes."
            )
        options = {
            "references": References.of(conditioning, latent),
            "distilled": distilled,
            "unmergeable": cannot_merge,
        }
        return cls(options, note)

    @staticmethod
    def taken_from(values: dict[str, Any]) -> dict[str, Any]:
        """The values of these inputs, which are taken out of all ``values``."""
        names = ("empty_prompts", "cannot_merge", "conditioning", "latent")
        return {name: values.pop(name) for name in names if name in values}


def budget_of(memory: float) -> int | Literal["free"]:
    """Bytes, from the input ``memory``."""
    return round(memory * 2**30) if memory else "free"
