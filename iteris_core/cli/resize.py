"""``iteris resize`` and ``iteris extract``, which share the size, the base and the output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from ..calibration import Calibration
from ..concepts import Concept
from ..config import read_concept
from ..edit.extract import extract_lora
from ..edit.resize import Reduced, resize_lora
from ..edit.target import Target
from ..errors import InputFileError, UsageError
from ..lora_files import DTYPES, Layout, ReadOptions, check_target
from ..lora_files.experts import write_or_keep
from ..lora_files.own_names import read_by_own_names
from . import options as shared
from .base import check_base, device_of, load_base
from .common import progress_bars
from .inputs import check_apart, check_concepts, read_lines
from .merge_file import parse_concept
from .options import RESULT, argument, bytes_of, command, offered


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """One field per option, with the option's name."""

    output: Path = offered("The .safetensors to write", "--output", "-o", default=...)
    rank: int | None = offered("Make the file as small as this rank in every layer would")
    size: float | None = offered("Limit the file to this many megabytes")
    energy: float | None = offered("Share to keep of what the LoRA adds to the layers' outputs")
    layout: Layout | None = offered("Naming scheme of the file", panel=RESULT)
    dtype: shared.Dtype = offered("Type of the file", panel=RESULT, default="float16")
    overwrite: shared.Overwrite = False
    as_json: shared.AsJson = False
    quiet: bool = offered(
        "Show only warnings and errors", "--quiet", "-q", panel=RESULT, default=False
    )
    device: shared.Device = None
    base_dtype: shared.BaseDtype = None
    memory: shared.Memory = None

    def run(self, calibration: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments for the functions of :mod:`..edit`."""
        return {
            "target": Target(self.rank, self.size, self.energy),
            "calibration": Calibration.from_mapping(calibration),
            "itemsize": DTYPES[self.dtype].itemsize,
            "memory_budget": bytes_of(self.memory),
        }

    def save(self, reduced: Reduced, layout: Layout | None, source: Path) -> None:
        """Write the LoRA that was reduced from ``source``, or keep it elsewhere if that fails."""
        how: dict[str, Any] = {"layout": layout, "dtype": self.dtype, "overwrite": self.overwrite}
        path = write_or_keep(reduced.lora, self.output, **how)[0]
        sizes = [file.stat().st_size / 1e6 for file in (source, path) if file.is_file()]
        if self.as_json:
            typer.echo(json.dumps({"path": str(path), "megabytes": sizes, **reduced.to_dict()}))
        elif not self.quiet:
            typer.echo(escape(reduced.summary()))
            typer.echo(f"Wrote {path} ({' → '.join(f'{size:.3g}' for size in sizes)} MB).")


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(Sizing):
    """One field per option, with the option's name."""

    file: str = argument("A LoRA file, FILE or FILE:TRIGGER:CLASS", metavar="FILE")
    base: str | None = offered(
        "The base; every layer is fitted to its inputs in that model. Without it, singular "
        "values of the weights decide"
    )
    offload: shared.Offload = None
    allow_partial: shared.Partial = False


@command(ResizeOptions)
def resize(context: typer.Context, options: ResizeOptions, calibration: dict[str, Any]) -> None:
    """Reduce a LoRA to a lower rank, size or share of energy, with ranks shared out over layers.

    \b
    iteris resize cat.safetensors:sks:cat --base BASE --rank 8 \\
      -o cat-8.safetensors
    iteris resize cat.safetensors --size 20 -o cat-20mb.safetensors
    """
    how, output = options.run(calibration), options.output
    reading = ReadOptions(options.allow_partial)
    text = options.file
    concept = parse_concept(text) if ":" in Path(text).name else Concept(file=Path(text))
    file = concept.files[0]
    check_target(output, options.layout, options.dtype, options.overwrite)
    check_concepts([concept])
    check_apart([output], file, options.base)
    if options.base is None:
        if calibration:
            name = next(iter(calibration)).replace("_", "-")
            raise UsageError(f"--{name} needs a base to run: pass --base.")
        lora, own_layout = read_by_own_names(file, reading)
        concept, host = replace(concept, lora=lora), None
    else:
        from ..hosts.diffusers import DiffusersHost

        how_loaded = options.device, options.base_dtype, options.offload
        host, own_layout = DiffusersHost(load_base(options.base, *how_loaded)), None
        concept = read_concept(concept, host, reading)
    with progress_bars(visible=not options.quiet) as on_progress:
        reduced = resize_lora(concept, host=host, on_progress=on_progress, **how)
    options.save(reduced, options.layout or own_layout, file)


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(Sizing):
    """One field per option, with the option's name."""

    base: str = argument("The model that was fine-tuned: a diffusers pipeline", metavar="BASE")
    tuned: str = argument("The fine-tune, of the same architecture", metavar="TUNED")
    prompts: Path | None = offered(
        "A text file of prompts that show the fine-tuning, one per line; default: built-in captions"
    )


@command(ExtractOptions)
def extract(context: typer.Context, options: ExtractOptions, calibration: dict[str, Any]) -> None:
    """Extract a LoRA from a fine-tune and its base, and compare it with the fine-tune.

    \b
    iteris extract BASE TUNED --rank 32 -o tuned.safetensors
    """
    from ..hosts.diffusers import DiffusersHost
    from ..hosts.diffusers_lora import base_of

    how, bases = options.run(calibration), (options.base, options.tuned)
    check_target(options.output, options.layout, options.dtype, options.overwrite)
    device = device_of(options.device)
    for base in bases:
        check_base(base)
    check_apart([options.output], *bases)
    if options.prompts is not None:
        how["prompts"] = read_lines(options.prompts)
        if not how["prompts"]:
            raise InputFileError(f"{options.prompts} has no prompts; write one per line.")
    pipelines = [load_base(base, device, options.base_dtype) for base in bases]
    of_base, of_tuned = map(DiffusersHost, pipelines)
    with progress_bars(visible=not options.quiet) as on_progress:
        kind = base_of(pipelines[0], of_base.sites())
        extracted = extract_lora(of_base, of_tuned, kind=kind, on_progress=on_progress, **how)
    options.save(extracted, options.layout, Path(options.tuned))
