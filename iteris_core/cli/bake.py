"""``iteris bake``"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from ..concept_config import ConceptConfig
from ..edit.bake import Precision, places_in, weight_in
from ..edit.bake import bake as bake_model
from ..edit.rounding import FP8
from ..errors import BaseError, OutputError, UsageError
from ..lora import Lora, LowRank, concatenate
from ..lora_files import ReadOptions, check_target, read_header, read_lora_file
from ..lora_files.peft_folder import check_folder
from ..progress import Progress
from .base import check_base
from .checks import check_concepts
from .common import option, progress_bars
from .inspect import known_base
from .sizing import Energy, Overwrite, Partial

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_LORA = re.compile(rf"(.+\.safetensors)(?::({_NUMBER})(?:/({_NUMBER}))?)?")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def bake(
    base: Annotated[
        str, typer.Argument(help="A .safetensors checkpoint, or a diffusers folder", metavar="BASE")
    ],
    lora: Annotated[
        list[str],
        option("FILE, FILE:0.8, or FILE:0.8/0.5: model and text encoders; once for each LoRA"),
    ],
    output: Annotated[Path, option("The file or folder to write", "--output", "-o")],
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32", "fp8"] | None,
        option(
            "Of the weights; their own by default. fp8: linear layers as float8 with a scale "
            "each, for ComfyUI"
        ),
    ] = None,
    seed: Annotated[
        int | None, option("Round up and down by chance from this seed, not to the nearest")
    ] = None,
    energy: Energy = 0.999,
    allow_partial: Partial = False,
    overwrite: Overwrite = False,
    quiet: Annotated[bool, option("Show nothing but what is wrong", "--quiet", "-q")] = False,
) -> None:
    """Add LoRAs to the weights of a model, under the names that its files have."""
    source = Path(base)
    loras = [_parsed(text) for text in lora]
    _check(source, base, output, loras, dtype, overwrite=overwrite)
    options = ReadOptions(allow_partial, energy)
    precision = Precision(FP8 if dtype == "fp8" else dtype and _DTYPES[dtype], seed)
    known = None if source.is_dir() else known_base(*read_header(loras[0][0]))
    places, model = places_in(source, known)
    read = [read_lora_file(file, model, weight_in(places), options) for file, *_ in loras]
    changes = _summed(read, [strengths for _, *strengths in loras])
    with progress_bars(visible=not quiet) as on_progress:

        def tick(done: int, total: int) -> None:
            on_progress(Progress("writing weights", done, total))

        bake_model(source, output, changes, places, precision, tick)
    if not quiet:
        for one in read:
            for note in one.notes:
                typer.echo(f"{one.name}: {note}")
        typer.echo(f"Wrote {output}: {len(changes)} layers changed.")


def _parsed(text: str) -> tuple[Path, float, float]:
    """File, and the strengths of the model and of the text encoders."""
    match = _LORA.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--lora {text!r} is not FILE.safetensors, FILE.safetensors:0.8 or "
            "FILE.safetensors:0.8/0.5."
        )
    strength = float(match[2] or 1)
    return Path(match[1]), strength, float(match[3] or strength)


def _check(
    source: Path,
    base: str,
    output: Path,
    loras: Sequence[tuple[Path, float, float]],
    dtype: str | None,
    *,
    overwrite: bool,
) -> None:
    """Raise :class:`IterisError` for what could not be baked or written, by headers alone."""
    if not source.exists():
        raise BaseError(f"The base {base!r} does not exist; give a file or a folder that is here.")
    check_base(base)
    check_concepts([ConceptConfig(file=file) for file, *_ in loras], run_base=False)
    if output.exists() and output.samefile(source):
        raise OutputError(f"{output} is the base itself, which would be lost; choose another name.")
    if source.is_file():
        check_target(output, None, "float16", overwrite)
        return
    check_folder(output)
    if dtype == "fp8":
        raise OutputError("A folder of diffusers holds no fp8 with scales; bake a single file.")


def _summed(loras: Sequence[Lora], strengths: Sequence[Sequence[float]]) -> dict[str, LowRank]:
    changes: dict[str, list[LowRank]] = {}
    for lora, (model, text) in zip(loras, strengths, strict=True):
        for site, change in lora.sites.items():
            factor = text if site.startswith("text_encoder") else model
            changes.setdefault(site, []).append(change.scaled(factor))
    return {site: concatenate(parts) for site, parts in changes.items()}
