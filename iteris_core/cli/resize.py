"""``iteris resize``"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..concepts import Concept
from ..config import ConceptConfig
from ..edit.resize import resize_lora
from ..errors import OutputError, UsageError
from ..hosts.protocol import Host
from ..lora_files import Layout, ReadOptions, check_target
from ..lora_files.own_names import check_by_own_names, read_by_own_names
from ..reading import read_concept
from .base import load_base
from .checks import check_apart, check_concepts
from .common import Offload, progress_bars
from .concept_options import parse_concept
from .options import command, given_by
from .sizing import Partial, Sizing


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(Sizing):
    """One field per option, with the option's name."""

    files: Annotated[
        list[str],
        typer.Argument(help="LoRA files, each FILE or FILE:TRIGGER:CLASS", metavar="FILE…"),
    ]
    base: str | None = given_by(
        "The base; every layer is fitted to its inputs in that model. Without it, singular values "
        "of the weights decide"
    )
    offload: Offload = None
    allow_partial: Partial = False


@command(ResizeOptions)
def resize(context: typer.Context, options: ResizeOptions) -> None:
    """Reduce LoRAs to a lower rank, size or share of energy, with ranks shared out over layers.

    \b
    iteris resize cat.safetensors:sks:cat --base BASE --rank 8 \\
      -o cat-8.safetensors
    iteris resize cat.safetensors dog.safetensors --size 20 -o smaller
    """
    target, how = options.target, options.run
    reading = ReadOptions(options.allow_partial, vectors=True)
    configs = [
        parse_concept(text) if ":" in Path(text).name else ConceptConfig(file=Path(text))
        for text in options.files
    ]
    outputs = _outputs(configs, options.output)
    for path in outputs:
        made = options.output.with_name(f"{options.output.name}-{path.name}")
        known = path if path.parent.is_dir() else made  # the folder will be created
        check_target(known, options.layout, options.dtype, options.overwrite)
    check_concepts(configs)
    check_apart(outputs, configs)
    host = _host(options, configs)
    outputs[0].parent.mkdir(exist_ok=True)
    reports: list[dict[str, Any]] = []
    for config, path in zip(configs, outputs, strict=True):
        concept, layout = _read(config, host, reading)
        with progress_bars(visible=not options.quiet) as on_progress:
            found = resize_lora(concept, target, host, on_progress=on_progress, **how)
        reports.append(options.save(found, path, options.layout or layout, config.files[0]))
    if options.as_json:
        typer.echo(json.dumps({"files": reports}))


def _outputs(configs: Sequence[ConceptConfig], output: Path) -> list[Path]:
    """The output file for each LoRA."""
    if len(configs) == 1 and output.suffix:
        return [output]
    if output.suffix or (output.exists() and not output.is_dir()):
        raise OutputError(f"{output} is not a folder; results of several files go into one.")
    paths = [output / Path(config.name).name for config in configs]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise OutputError(f"Two of the files are named {twice.name}; resize them one at a time.")
    return paths


def _host(options: ResizeOptions, configs: Sequence[ConceptConfig]) -> Host | None:
    if options.base is None:
        if options.calibration:
            name = next(iter(options.calibration)).replace("_", "-")
            raise UsageError(f"--{name} needs a base to run: pass --base.")
        for config in configs:
            check_by_own_names(config.files[0])
        return None
    pipeline = load_base(
        options.base, options.device, dtype=options.base_dtype, offload=options.offload
    )
    from ..hosts.diffusers import DiffusersHost

    return DiffusersHost(pipeline)


def _read(
    config: ConceptConfig, host: Host | None, reading: ReadOptions
) -> tuple[Concept, Layout | None]:
    if host is not None:
        return read_concept(config, host, reading), None
    lora, layout = read_by_own_names(config.files[0], reading)
    return config.concept(lora), layout
