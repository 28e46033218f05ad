"""``iteris extract``"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..concepts import Calibration
from ..edit.extract import extract_lora
from ..errors import InputFileError
from ..lora_files import check_target
from .base import check_base, device_of, load_base
from .common import progress_bars
from .inputs import read_prompts
from .options import CALIBRATION, command, option
from .sizing import Sizing


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(Sizing):
    """One field per option, with the option's name."""

    base: Annotated[
        str,
        typer.Argument(help="The model that was fine-tuned: a diffusers pipeline", metavar="BASE"),
    ]
    tuned: Annotated[
        str, typer.Argument(help="The fine-tune, of the same architecture", metavar="TUNED")
    ]
    prompts: Annotated[
        Path | None,
        option(
            "A text file of prompts that show the fine-tuning, one per line; default: built-in "
            "captions"
        ),
    ] = None


@command(ExtractOptions, Calibration, CALIBRATION)
def extract(context: typer.Context, options: ExtractOptions, calibration: dict[str, Any]) -> None:
    """Extract a LoRA from a fine-tune and its base, and compare it with the fine-tune.

    \b
    iteris extract BASE TUNED --rank 32 -o tuned.safetensors
    """
    from ..hosts.diffusers import DiffusersHost
    from ..hosts.diffusers_lora import base_of

    target, how, bases = options.target, options.run(calibration), (options.base, options.tuned)
    check_target(options.output, options.layout, options.dtype, options.overwrite)
    device = device_of(options.device)
    for base in bases:
        check_base(base)
    if options.prompts is not None:
        how["prompts"] = read_prompts(options.prompts)
        if not how["prompts"]:
            raise InputFileError(f"{options.prompts} has no prompts; write one per line.")
    pipelines = [load_base(base, device, dtype=options.base_dtype) for base in bases]
    of_base, of_tuned = map(DiffusersHost, pipelines)
    with progress_bars(visible=not options.quiet) as on_progress:
        kind = base_of(pipelines[0], of_base.sites())
        found = extract_lora(
            of_base, of_tuned, target, kind, layout=options.layout, on_progress=on_progress, **how
        )
    report = options.save(found, options.output, options.layout, Path(options.tuned))
    if options.as_json:
        typer.echo(json.dumps(report))
