"""The options of ``iteris merge``, in the order of its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..lora_files import Layout
from ..merge import Unmergeable
from ..presets import PresetName
from .common import AGAIN, BASE, CALIBRATION, METHOD, READING, RESULT, TEXT_MODELS, option
from .merge_file import use_merge_file
from .options import (
    CONCEPT_HELP,
    PRESET_HELP,
    Dtype,
    Latents,
    calibration_option,
    method_names,
    setting_names,
)

Output = Annotated[
    Path,
    option(
        "The .safetensors to write (transformers: a folder). A .yaml: write these options as a "
        "merge file, and merge nothing",
        "--output",
        "-o",
    ),
]
Base = Annotated[
    str | None,
    typer.Argument(
        help="A pipeline of diffusers (a folder, a .safetensors, a hub name), a model of "
        "transformers, or a merge file (.yaml), in which every option is a key.",
        metavar="BASE",
        is_eager=True,
        callback=use_merge_file,
    ),
]
Concepts = Annotated[list[str] | None, option(CONCEPT_HELP)]
From = Annotated[
    Path | None,
    option(
        "Run the merge again that wrote this file; BASE is looked for beside it",
        "--from",
        panel=AGAIN,
    ),
]
Loras = Annotated[
    Path | None,
    option(
        "With --from or a merge file: the folder of the LoRAs, if they are not beside it",
        panel=AGAIN,
    ),
]
MethodName = Annotated[
    str | None,
    option(
        "iteris by default; iteris methods lists the others",
        autocompletion=method_names,
        panel=METHOD,
    ),
]
Set = Annotated[
    list[str] | None,
    option(
        "NAME=VALUE of the method or the calibration, such as rank=16, guidance=2.5; "
        "iteris methods lists all",
        "--set",
        autocompletion=setting_names,
        panel=METHOD,
    ),
]
Preset = Annotated[PresetName | None, option(PRESET_HELP)]
Preserve = Annotated[
    Path | None, option("A text file of prompts on which the base is to stay", panel=METHOD)
]
PreserveWeight = Annotated[
    float, option("What --preserve counts; much of it weakens the concepts", panel=METHOD, min=0)
]
Templates = Annotated[
    Path | None,
    option(
        "A text file of prompt templates, with {} for the concept, or for two", panel=CALIBRATION
    ),
]
Samples = Annotated[int | None, calibration_option("samples")]
Timesteps = Annotated[int | None, calibration_option("timesteps")]
LatentsOf = Annotated[Latents | None, calibration_option("latents")]
DenoisingSteps = Annotated[int | None, calibration_option("denoising_steps")]
Guidance = Annotated[float | None, calibration_option("guidance")]
EmptyShare = Annotated[float | None, calibration_option("empty_share")]
Contexts = Annotated[float | None, calibration_option("contexts")]
Generic = Annotated[float | None, calibration_option("generic")]
Composites = Annotated[float | None, calibration_option("composites")]
LatentSize = Annotated[int | None, calibration_option("latent_size")]
Frames = Annotated[int | None, calibration_option("frames")]
Seed = Annotated[int | None, calibration_option("seed")]
Generate = Annotated[
    int | None, option("Features while each LoRA writes so many tokens", panel=TEXT_MODELS)
]
ModelClass = Annotated[
    str | None,
    option("Class of the base, where the adapter does not name one", panel=TEXT_MODELS),
]
FileLayout = Annotated[
    Layout | None,
    option("Of the file; kohya by default, or peft where a base has no such names", panel=RESULT),
]
FileDtype = Annotated[Dtype, option("Of the file", panel=RESULT)]
Image = Annotated[
    Path | None,
    option("A picture for a base that asks for one: to edit, to begin with, …", panel=BASE),
]
MaskImage = Annotated[
    Path | None, option("Which part of --image an inpainting base paints", panel=BASE)
]
AllowPartial = Annotated[
    bool,
    option("Leave out what a LoRA cannot represent, and list it", "--allow-partial", panel=READING),
]
UnmergeableSites = Annotated[
    Unmergeable | None,
    option(
        "Layers whose features cannot be collected: refuse (default), skip, or take the LoRAs' "
        "mean",
        panel=READING,
    ),
]
Energy = Annotated[
    float, option("Share kept of changes that are not low rank by themselves", panel=READING)
]
Rename = Annotated[
    list[str] | None, option("LORA:NAME=NEW: another name for an embedding", panel=READING)
]
Overwrite = Annotated[bool, option("Replace an existing output file", "--overwrite")]
Plan = Annotated[
    bool,
    option("Check everything, show how the merge would keep to the memory, and stop", "--plan"),
]
Quiet = Annotated[
    bool,
    option("Show nothing but what is wrong", "--quiet", "-q", panel=RESULT),
]
Json = Annotated[bool, option("Print the report as JSON", "--json", panel=RESULT)]
Plot = Annotated[Path | None, option("A PNG of the output errors per block", panel=RESULT)]
