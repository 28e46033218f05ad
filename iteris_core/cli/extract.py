"""``iteris extract``"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..edit.extract import check_alike, extract_lora
from ..errors import InputFileError
from ..lora_files import check_target, read_header
from .base import check_base, device_of, load_base
from .common import progress_bars
from .options import command, given_by, read_prompts
from .sizing import Sizing

_DENOISERS = ("unet", "transformer")
_PREFIX = "model.diffusion_model."


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
    prompts: Path | None = given_by(
        "A text file of prompts that show the fine-tuning, one per line; default: built-in captions"
    )


@command(ExtractOptions)
def extract(context: typer.Context, options: ExtractOptions) -> None:
    """Extract a LoRA from a fine-tune and its base, and compare it with the fine-tune.

    \b
    iteris extract BASE TUNED --rank 32 -o tuned.safetensors
    """
    from ..hosts.diffusers import DiffusersHost
    from ..hosts.diffusers_lora import base_of

    target, how, bases = options.target, options.run, (options.base, options.tuned)
    check_target(options.output, options.layout, options.dtype, options.overwrite)
    device = device_of(options.device)
    for base in bases:
        check_base(base)
    one, two = (_header(Path(base)) for base in bases)
    if one and two:
        check_alike(one, two)
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


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a denoiser's tensors, from file headers only; empty if the files are not
    local."""
    files = [path] if path.is_file() else []
    for name in _DENOISERS:
        files += sorted((path / name).glob("*.safetensors"))
    shapes = {key: shape for file in files for key, shape in read_header(file)[0].items()}
    inner = {key: shape for key, shape in shapes.items() if key.startswith(_PREFIX)}
    return inner or shapes
