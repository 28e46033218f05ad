"""``iteris resize`` and ``iteris extract``, which share the size, the base and the output."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from ..calibration import Calibration
from ..concepts import Concept
from ..config import read_concept
from ..edit.extract import extract_lora
from ..edit.resize import Reduced, resize_lora
from ..edit.target import Target
from ..errors import InputFileError, UsageError
from ..lora_files import DTYPES, Layout, ReadOptions, check_target
from ..lora_files.embeddings import sidecar_files
from ..lora_files.experts import expert_files, write_or_keep
from ..lora_files.own_names import read_by_own_names
from ..saving import interrupts_wait
from . import options as shared
from .base import check_base, device_of, load_base
from .common import progress_bars
from .inputs import check_apart, check_concepts, check_embeddings, check_used, read_lines
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

    def save(self, reduced: Reduced, layout: Layout | None, *sources: Path) -> None:
        """Write the LoRA that was reduced from ``sources``, or keep it elsewhere if that fails."""
        how: dict[str, Any] = {"layout": layout, "dtype": self.dtype, "overwrite": self.overwrite}
        with interrupts_wait() as pressed:
            paths = write_or_keep(reduced.lora, self.output, **how)
            files = (sources, paths) if all(map(Path.is_file, sources)) else (paths,)
            sizes = [sum(file.stat().st_size for file in some) / 1e6 for some in files]
            if self.as_json:
                told = {"path": str(paths[0]), "megabytes": sizes, **reduced.to_dict()}
                typer.echo(json.dumps(told))
            elif not self.quiet:
                typer.echo(reduced.summary())
                named = " and ".join(map(str, paths))
                typer.echo(f"Wrote {named} ({' → '.join(f'{size:.3g}' for size in sizes)} MB).")
            pressed.clear()  # it is written


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(Sizing):
    """One field per option, with the option's name."""

    file: str = argument(
        "A LoRA file, FILE or FILE:TRIGGER:CLASS, with ,blocks= or ,layers= for a part of it; "
        "HIGH+LOW for a base with two experts",
        metavar="FILE",
    )
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
    concept = _one_lora(options.file)
    paths = (output,) if concept.low is None else expert_files(output)
    for path in paths:
        check_target(path, options.layout, options.dtype, options.overwrite)
    read = check_concepts([concept])
    how_written = {"overwrite": options.overwrite}
    embeddings = check_embeddings(read, paths[0], options.layout, **how_written)
    beside = [embedding for file in concept.files for embedding in sidecar_files(file)]
    check_apart([*paths, *embeddings], options.base, *concept.files, *beside)
    if options.base is None:
        fields = [f"{name}=" for name in ("prompts", "blocks") if name in concept.stated]
        for name in (*(f"--{name.replace('_', '-')}" for name in calibration), *fields):
            raise UsageError(f"{name} needs a base to run: pass --base.")
        if concept.low is not None:
            raise UsageError("Two experts need their base: pass --base, or resize each file.")
        lora, own_layout = read_by_own_names(concept.files[0], concept.options(reading))
        concept, host = replace(concept, lora=lora), None
    else:
        from ..hosts.diffusers import DiffusersHost

        how_loaded = options.device, options.base_dtype, options.offload
        host, own_layout = DiffusersHost(load_base(options.base, *how_loaded)), None
        concept = read_concept(concept, host, reading)
    with progress_bars(visible=not options.quiet) as on_progress:
        reduced = resize_lora(concept, host=host, on_progress=on_progress, **how)
    options.save(reduced, options.layout or own_layout, *concept.files)


def _one_lora(text: str) -> Concept:
    more = re.search(r"\.safetensors[:,+]", text) or {":", ","} & {*Path(text).name}
    plain = Path(text).is_file() or not more
    concept = Concept(file=Path(text)) if plain else parse_concept(text, option="FILE")
    if not concept.files:
        raise UsageError(f"{text!r} names no LoRA file.")
    check_used(concept, "strength", "text_strength", "weight", "always_on", what="iteris resize")
    return concept


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
    finished: list[Reduced] = []
    try:
        with progress_bars(visible=not options.quiet) as on_progress:
            how |= {"on_progress": on_progress, "rescue": finished.append}
            kind = base_of(pipelines[0], of_base.sites())
            finished.append(extract_lora(of_base, of_tuned, kind=kind, **how))
    except KeyboardInterrupt:
        if not finished:
            raise
    for extracted in finished:
        options.save(extracted, options.layout, Path(options.tuned))
