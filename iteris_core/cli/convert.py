"""``iteris convert``"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..config import ConceptConfig
from ..edit.convert import Names, convert_lora, largest_error
from ..lora import Lora
from ..lora_files import DTYPES, ReadOptions, check_target, read_lora_file
from ..lora_files.metadata import find_phrases
from ..lora_files.tensors import dtypes_of, read_tensors
from .base import lora_reader
from .checks import check_apart, check_concepts
from .options import AsJson, Dtype, Energy, Overwrite, Partial, option


def convert(
    file: Annotated[
        Path, typer.Argument(help="A LoRA file of any layout and kind", metavar="FILE")
    ],
    output: Annotated[Path, option("The .safetensors to write", "--output", "-o")],
    layout: Annotated[Names, option("Naming scheme of the file")] = "kohya",
    base: Annotated[
        str | None, option("The base, for a DoRA or if its shape differs from SD 1.5, XL, 3, FLUX")
    ] = None,
    dtype: Annotated[Dtype | None, option("Type of the file; unchanged by default")] = None,
    energy: Energy = 0.999,
    allow_partial: Partial = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Rename a LoRA for another tool; LoHa, LoKr, LoCon and DoRA become a plain LoRA.

    \b
    iteris convert cat.safetensors --layout comfyui -o cat-comfyui.safetensors
    """
    check_target(output, None, "float16", overwrite)
    config = ConceptConfig(file=file)
    check_concepts([config])
    check_apart([output], [config])
    options = ReadOptions(allow_partial, energy, vectors=layout != "diffusers")
    lora = _read(file, base, options)
    own = next(iter(dtypes_of(read_tensors(file)[0])), "float16")  # the most common one
    written = dtype or (own if own in DTYPES else "float16")
    path = convert_lora(lora, output, layout, dtype=written, overwrite=overwrite)
    notes = list(lora.notes)
    if own.startswith("float8"):
        notes.append(f"{own} becomes {written}: few tools load a LoRA in float8")
    assert lora.base is not None  # convert_lora refuses others
    back = read_lora_file(path, lora.base, options=ReadOptions(vectors=True))
    error = largest_error(lora, back)
    if as_json:
        report = {"path": str(path), "dtype": written, "error": error, "notes": notes}
        typer.echo(json.dumps(report))
        return
    for note in notes:
        typer.echo(escape(note))
    outcome = f"within {error:.2g} of" if error else "bit-identical to"
    typer.echo(f"Read back: every layer's change is {outcome} the original.")
    typer.echo(f"Wrote {path} ({written}, {len(lora.sites)} layers).")


def _read(file: Path, base: str | None, options: ReadOptions) -> Lora:
    """The LoRA; trigger words from notes beside its file are added to its metadata."""
    lora = lora_reader(base)(file, options)
    found = find_phrases(file, lora.metadata)
    if found.source in ("", "file"):
        return lora
    words = {"modelspec.trigger_phrase": ", ".join(found.phrases)}
    return replace(lora, metadata={**lora.metadata, **words})
