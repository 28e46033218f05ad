"""The options of ``iteris merge``, in the order of its help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import typer

from ..concepts import PRESERVE_WEIGHT, Calibration
from ..config import Unmergeable
from ..lora_files import Layout
from ..presets import PresetName
from .common import (
    AGAIN,
    BASE,
    CALIBRATION,
    METHOD,
    READING,
    RESULT,
    TEXT_MODELS,
    BaseDtype,
    Device,
    Memory,
    Offload,
)
from .merge_file import use_merge_file
from .options import (
    CONCEPT_HELP,
    OPTION,
    PRESET_HELP,
    Dtype,
    given_by,
    method_names,
    setting_names,
    settings_of,
)


@dataclass(frozen=True)
class MergeOptions:
    """A field for each option, named like it."""

    output: Path = given_by(
        "The .safetensors to write (transformers: a folder). A .yaml: write these options as a "
        "merge file, and merge nothing",
        "--output",
        "-o",
        default=MISSING,
    )
    base: str | None = field(
        default=None,
        metadata={
            OPTION: typer.Argument(
                help="A pipeline of diffusers (a folder, a .safetensors, a hub name), a model of "
                "transformers, or a merge file (.yaml), in which every option is a key.",
                metavar="BASE",
                is_eager=True,
                callback=use_merge_file,
            )
        },
    )
    concept: list[str] | None = given_by(CONCEPT_HELP)
    preset: PresetName | None = given_by(PRESET_HELP)
    overwrite: bool = given_by("Replace an existing output file", "--overwrite", default=False)
    plan: bool = given_by(
        "Check everything, show how the merge would keep to the memory, and stop",
        "--plan",
        default=False,
    )
    quiet: bool = given_by(
        "Show nothing but what is wrong", "--quiet", "-q", panel=RESULT, default=False
    )
    method: str | None = given_by(
        "iteris by default; iteris methods lists the others",
        autocompletion=method_names,
        panel=METHOD,
    )
    setting: list[str] | None = given_by(
        "NAME=VALUE of the method or the calibration, such as rank=16, guidance=2.5; "
        "iteris methods lists all",
        "--set",
        autocompletion=setting_names,
        panel=METHOD,
    )
    preserve: Path | None = given_by(
        "A text file of prompts on which the base is to stay", panel=METHOD
    )
    preserve_weight: float = given_by(
        "What --preserve counts; much of it weakens the concepts",
        panel=METHOD,
        min=0,
        default=PRESERVE_WEIGHT,
    )
    from_file: Path | None = given_by(
        "Run the merge again that wrote this file; BASE is looked for beside it",
        "--from",
        panel=AGAIN,
    )
    loras: Path | None = given_by(
        "With --from or a merge file: the folder of the LoRAs, if they are not beside it",
        panel=AGAIN,
    )
    templates: Path | None = given_by(
        "A text file of prompt templates, with {} for the concept, or for two", panel=CALIBRATION
    )
    calibration: Mapping[str, Any] = settings_of(Calibration, CALIBRATION)
    generate: int | None = given_by(
        "Features while each LoRA writes so many tokens", panel=TEXT_MODELS
    )
    model_class: str | None = given_by(
        "Class of the base, where the adapter does not name one", panel=TEXT_MODELS
    )
    layout: Layout | None = given_by(
        "Of the file; kohya by default, or peft where a base has no such names", panel=RESULT
    )
    dtype: Dtype = given_by("Of the file", panel=RESULT, default="float16")
    image: Path | None = given_by(
        "The picture that a base needs: to edit, to begin with, …", panel=BASE
    )
    mask_image: Path | None = given_by(
        "Which part of --image an inpainting base paints", panel=BASE
    )
    device: Device = None
    base_dtype: BaseDtype = None
    offload: Offload = None
    memory: Memory = None
    allow_partial: bool = given_by(
        "Leave out what a LoRA cannot represent, and list it",
        "--allow-partial",
        panel=READING,
        default=False,
    )
    unmergeable: Unmergeable | None = given_by(
        "Layers whose features cannot be collected: refuse (default), skip, or take the LoRAs' "
        "mean",
        panel=READING,
    )
    energy: float = given_by(
        "Share kept of changes that are not low rank by themselves", panel=READING, default=0.999
    )
    rename: list[str] | None = given_by(
        "LORA:NAME=NEW: another name for an embedding", panel=READING
    )
    as_json: bool = given_by("Print the report as JSON", "--json", panel=RESULT, default=False)
    card: bool = given_by(
        "Beside the file a card (.md), and the notes that browsers of LoRAs read (.metadata.json)",
        "--card",
        panel=RESULT,
        default=False,
    )
    plot: Path | None = given_by("A PNG of the output errors per block", panel=RESULT)
