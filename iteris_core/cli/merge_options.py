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
    """One field per option, with the option's name."""

    output: Path = given_by(
        "The .safetensors to write (transformers: a folder). With a .yaml, save these options as "
        "a merge file instead of merging",
        "--output",
        "-o",
        default=MISSING,
    )
    base: str | None = field(
        default=None,
        metadata={
            OPTION: typer.Argument(
                help="A diffusers pipeline (a folder, a .safetensors, a hub name), a transformers "
                "model, or a merge file (.yaml), which can set every option. Methods that look at "
                "weights only, such as average, need none.",
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
        "Check everything, show the plan, and stop",
        "--plan",
        default=False,
    )
    quiet: bool = given_by("Show nothing but errors", "--quiet", "-q", panel=RESULT, default=False)
    method: str | None = given_by(
        "Default: iteris; the command iteris methods lists all",
        autocompletion=method_names,
        panel=METHOD,
    )
    setting: list[str] | None = given_by(
        "NAME=VALUE for the method or the calibration, such as rank=16, guidance=2.5; iteris "
        "methods lists all",
        "--set",
        autocompletion=setting_names,
        panel=METHOD,
    )
    preserve: Path | None = given_by(
        "A file of prompts on which the base should stay", panel=METHOD
    )
    preserve_weight: float = given_by(
        "Weight of --preserve; a high weight weakens the concepts",
        panel=METHOD,
        min=0,
        default=PRESERVE_WEIGHT,
    )
    from_file: Path | None = given_by(
        "Repeat the merge that wrote this file; by default BASE is looked up beside it",
        "--from",
        panel=AGAIN,
    )
    loras: Path | None = given_by(
        "With --from or a merge file: a folder above the LoRAs, if they are not beside it",
        panel=AGAIN,
    )
    templates: Path | None = given_by(
        "A text file of prompt templates, with {} for the concept (two {} for pairs)",
        panel=CALIBRATION,
    )
    calibration: Mapping[str, Any] = settings_of(Calibration, CALIBRATION)
    generate: int | None = given_by(
        "Collect features while each LoRA generates N tokens", panel=TEXT_MODELS
    )
    model_class: str | None = given_by(
        "Class of the base, if the adapter does not name one", panel=TEXT_MODELS
    )
    layout: Layout | None = given_by(
        "Naming scheme of the file; default: kohya, or peft if the base has no kohya names",
        panel=RESULT,
    )
    dtype: Dtype = given_by("Type of the file", panel=RESULT, default="float16")
    image: Path | None = given_by("Input image of the base: to edit, to start from, …", panel=BASE)
    mask_image: Path | None = given_by("Mask of --image, for an inpainting base", panel=BASE)
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
        "For layers whose features cannot be collected: refuse (default), skip them, or use the "
        "LoRAs' mean",
        panel=READING,
    )
    energy: float = given_by(
        "Share to keep of changes that are not low rank", panel=READING, default=0.999
    )
    rename: list[str] | None = given_by("LORA:NAME=NEW: rename an embedding", panel=READING)
    as_json: bool = given_by("Print the report as JSON", "--json", panel=RESULT, default=False)
    card: bool = given_by(
        "Also write a card (.md), and the notes that LoRA browsers read (.metadata.json)",
        "--card",
        panel=RESULT,
        default=False,
    )
