"""``iteris resize``"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..concepts import Calibration
from ..config import ConceptConfig
from ..edit.resize import resize_lora
from ..errors import UsageError
from ..lora_files import ReadOptions, check_target
from ..lora_files.own_names import read_by_own_names
from ..reading import read_concept
from .base import load_base
from .checks import check_apart, check_concepts
from .common import progress_bars
from .concept_options import parse_concept
from .options import CALIBRATION, Offload, Partial, command, option
from .sizing import Sizing


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(Sizing):
    """One field per option, with the option's name."""

    file: Annotated[
        str, typer.Argument(help="A LoRA file, FILE or FILE:TRIGGER:CLASS", metavar="FILE")
    ]
    base: Annotated[
        str | None,
        option(
            "The base; every layer is fitted to its inputs in that model. Without it, singular "
            "values of the weights decide"
        ),
    ] = None
    offload: Offload = None
    allow_partial: Partial = False


@command(ResizeOptions, Calibration, CALIBRATION)
def resize(context: typer.Context, options: ResizeOptions, calibration: dict[str, Any]) -> None:
    """Reduce a LoRA to a lower rank, size or share of energy, with ranks shared out over layers.

    \b
    iteris resize cat.safetensors:sks:cat --base BASE --rank 8 \\
      -o cat-8.safetensors
    iteris resize cat.safetensors --size 20 -o cat-20mb.safetensors
    """
    target, how, output = options.target, options.run(calibration), options.output
    reading = ReadOptions(options.allow_partial, vectors=True)
    text = options.file
    config = parse_concept(text) if ":" in Path(text).name else ConceptConfig(file=Path(text))
    file = config.files[0]
    check_target(output, options.layout, options.dtype, options.overwrite)
    check_concepts([config])
    check_apart([output], [config])
    if options.base is None:
        if calibration:
            name = next(iter(calibration)).replace("_", "-")
            raise UsageError(f"--{name} needs a base to run: pass --base.")
        lora, own_layout = read_by_own_names(file, reading)
        concept, host = config.concept(lora), None
    else:
        from ..hosts.diffusers import DiffusersHost

        pipeline = load_base(
            options.base, options.device, dtype=options.base_dtype, offload=options.offload
        )
        host, own_layout = DiffusersHost(pipeline), None
        concept = read_concept(config, host, reading)
    with progress_bars(visible=not options.quiet) as on_progress:
        found = resize_lora(concept, target, host, on_progress=on_progress, **how)
    report = options.save(found, output, options.layout or own_layout, file)
    if options.as_json:
        typer.echo(json.dumps(report))
