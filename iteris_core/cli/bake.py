"""``iteris bake``"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..config import ConceptConfig
from ..edit.bake import FP8, places_in, weight_in
from ..edit.bake import bake as bake_model
from ..errors import BaseError, OutputError, UsageError
from ..lora_files import DTYPES, ReadOptions, check_target, read_lora_file
from ..lora_files.peft_folder import check_folder
from ..passes.changes import changes_always
from ..progress import Progress
from .base import check_base, known_base, located
from .checks import check_concepts
from .common import progress_bars
from .concept_options import parse_concept
from .options import Energy, Overwrite, Partial, option


def bake(
    base: Annotated[
        str, typer.Argument(help="A .safetensors checkpoint, or a diffusers folder", metavar="BASE")
    ],
    lora: Annotated[
        list[str],
        option("FILE, FILE:0.8, or FILE:0.8/0.5 (model and text encoders); repeat for each LoRA"),
    ],
    output: Annotated[Path, option("The file or folder to write", "--output", "-o")],
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32", "fp8"] | None,
        option(
            "Type of the weights; unchanged by default. fp8: linear layers as float8 with one "
            "scale each, for ComfyUI"
        ),
    ] = None,
    energy: Energy = 0.999,
    allow_partial: Partial = False,
    overwrite: Overwrite = False,
    quiet: Annotated[bool, option("Show only warnings and errors", "--quiet", "-q")] = False,
) -> None:
    """Add LoRAs to a model's weights; names in its files stay the same.

    \b
    iteris bake model.safetensors --lora cat.safetensors:0.8 -o baked.safetensors
    """
    source = Path(located(base))
    configs = [parse_concept(text, option="--lora") for text in lora]
    _check(source, base, output, configs, dtype, overwrite=overwrite)
    options = ReadOptions(allow_partial, energy)
    known = None if source.is_dir() else known_base(configs[0].files[0])
    places, model = places_in(source, known)
    weight, files = weight_in(places), [config.files[0] for config in configs]
    read = [read_lora_file(file, model, weight, options) for file in files]
    concepts = [config.concept(one) for config, one in zip(configs, read, strict=True)]
    changes = changes_always(concepts)
    written = FP8 if dtype == "fp8" else DTYPES[dtype] if dtype else None
    with progress_bars(visible=not quiet) as on_progress:

        def tick(done: int, total: int) -> None:
            on_progress(Progress("writing weights", done, total))

        bake_model(source, output, changes, places, written, tick)
    if not quiet:
        for one in read:
            for note in one.notes:
                typer.echo(f"{one.name}: {note}")
        typer.echo(f"Wrote {output}: {len(changes)} layers changed.")


def _check(
    source: Path,
    base: str,
    output: Path,
    loras: Sequence[ConceptConfig],
    dtype: str | None,
    *,
    overwrite: bool,
) -> None:
    """Raise :class:`IterisError` if the LoRAs cannot be baked or the result written; reads headers
    only."""
    if not source.exists():
        raise BaseError(f"The base {base!r} does not exist; give an existing file or folder.")
    if not all(lora.files for lora in loras):
        raise UsageError("--lora must name a LoRA file.")
    check_base(base)
    check_concepts(loras)
    if output.exists() and output.samefile(source):
        raise OutputError(f"{output} is the base itself, which would be lost; choose another name.")
    if source.is_file():
        check_target(output, None, "float16", overwrite)
        return
    check_folder(output)
    if output.suffix == ".safetensors":
        raise OutputError(
            f"{base} is a folder, and so is the result; give {output.with_suffix('')} as its name."
        )
    if dtype == "fp8":
        raise OutputError("A diffusers folder cannot hold fp8 with scales; bake a single file.")
