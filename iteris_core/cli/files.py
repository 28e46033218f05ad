"""``iteris inspect``, ``convert`` and ``bake``: what runs no base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer

from ..architectures import architecture_of_file
from ..concepts import Concept
from ..edit.bake import bake as bake_model
from ..edit.bake import places_in, weight_in
from ..errors import BaseError, UsageError
from ..lora_files import (
    DTYPES,
    Layout,
    ReadOptions,
    check_target,
    read_header,
    read_lora_file,
    read_tensors,
    released_base,
    write_lora,
)
from ..lora_files.metadata import find_phrases
from ..lora_files.tensors import dtypes_of
from ..passes.changes import changes_always
from ..progress import Progress
from ..report.inspection import Interference, LoraFacts, describe, interference
from .base import check_base, lora_reader
from .common import print_table, progress_bars
from .inputs import check_apart, check_concepts, check_used
from .merge_file import parse_concept
from .options import AsJson, Dtype, Energy, Overwrite, Partial, option

_COLUMNS = (
    "0: disjoint; 1: identical. Row spaces: the inputs that two LoRAs read from a layer. Column "
    "spaces: the outputs that they write. Conflict: the share of their outputs in which they "
    "disagree."
)


def inspect(
    files: Annotated[list[Path], typer.Argument(help="LoRA files")],
    base: Annotated[
        str | None, option("The base, if its shape differs from SD 1.5, XL, 3 or FLUX")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what LoRA files contain, and where two of them will interfere.

    \b
    iteris inspect cat.safetensors dog.safetensors
    """
    options = ReadOptions(allow_partial=True, of_weight=False)
    read = lora_reader(base)
    tensors = [read_tensors(path)[0] for path in files]
    loras = [read(path, options) for path in files]
    facts = [describe(*pair) for pair in zip(loras, tensors, strict=True)]
    described = list(combinations(zip(loras, facts, strict=True), 2))
    pairs = [interference(a, b) for (a, of_a), (b, of_b) in described if of_a.base == of_b.base]
    if as_json:
        data = {"files": [asdict(f) for f in facts], "interference": [asdict(p) for p in pairs]}
        typer.echo(json.dumps(data))
        return
    for fact in facts:
        print_table((), _facts(fact), fact.name)
        rows = [(name, str(block.layers), f"{block.norm:.3g}", f"{block.share:.1%}")
                for name, block in fact.blocks.items()]  # fmt: skip
        headings = ("block", "layers", "norm", "share of energy")
        print_table(headings, rows, f"Blocks of {fact.name}")
    if pairs:
        headings = ("pair", "row spaces", "column spaces", "conflict")
        print_table(headings, map(_figures, pairs), "Interference", _COLUMNS)
    for (_, first), (_, second) in described:
        if first.base != second.base:
            typer.echo(
                f"{first.name} is a LoRA for {first.base}, {second.name} for {second.base}: they "
                "have no layer in common and cannot be merged."
            )


def _facts(facts: LoraFacts) -> list[tuple[str, str]]:
    def counts(counted: Mapping[Any, int]) -> str:
        if len(counted) == 1:
            return str(next(iter(counted)))
        return ", ".join(f"{value} ({count} ×)" for value, count in counted.items())

    return [
        ("base", facts.base),
        ("kind", counts(facts.kinds)),
        ("dtype", counts(facts.dtypes)),
        ("rank", counts(facts.ranks)),
        ("alpha", counts(facts.alphas)),
        ("sites", "; ".join(f"{c}: {n} of {m}" for c, (n, m) in facts.coverage.items())),
        ("trigger words", ", ".join(facts.triggers) or "none in the metadata"),
        *([("embeddings", ", ".join(facts.embeddings))] if facts.embeddings else []),
        *(("note", note) for note in facts.notes),
    ]


def _figures(pair: Interference) -> list[str]:
    name = f"{pair.first} / {pair.second}: {pair.shared or 'no'} shared sites"
    figures = (pair.rows, pair.columns, pair.conflict)
    return [name, *(f"{figure:.3f}" if pair.shared else "" for figure in figures)]


def convert(
    file: Annotated[
        Path, typer.Argument(help="A LoRA file of any layout and kind", metavar="FILE")
    ],
    output: Annotated[Path, option("The .safetensors to write", "--output", "-o")],
    layout: Annotated[Layout, option("Naming scheme of the file")] = "kohya",
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
    iteris convert cat.safetensors --layout peft -o cat-peft.safetensors
    """
    check_target(output, None, "float16", overwrite)
    check_concepts([Concept(file=file)])
    check_apart([output], file, base)
    lora = lora_reader(base)(file, ReadOptions(allow_partial, energy))
    phrases, source = find_phrases(file, lora.metadata)
    if source not in ("", "file"):  # from notes beside the file
        words = {"modelspec.trigger_phrase": ", ".join(phrases)}
        lora = replace(lora, metadata={**lora.metadata, **words})
    stored = next(iter(dtypes_of(read_tensors(file)[0])), "float16")  # the most common dtype
    written = dtype or (stored if stored in DTYPES else "float16")
    path = write_lora(lora, output, layout=layout, dtype=written, overwrite=overwrite)
    notes = list(lora.notes)
    if stored.startswith("float8"):
        notes.append(f"{stored} becomes {written}: few tools load a LoRA in float8")
    if as_json:
        report = {"path": str(path), "dtype": written, "notes": notes}
        typer.echo(json.dumps(report))
        return
    for note in notes:
        typer.echo(note)
    typer.echo(f"Wrote {path} ({written}, {len(lora.sites)} layers).")


def bake(
    base: Annotated[Path, typer.Argument(help="A .safetensors checkpoint", metavar="BASE")],
    lora: Annotated[
        list[str],
        option(
            "FILE, FILE:0.8, or FILE:0.8/0.5 (model and text encoders), with ,blocks= or ,layers= "
            "for a part of it; repeat for each LoRA"
        ),
    ],
    output: Annotated[Path, option("The .safetensors to write", "--output", "-o")],
    dtype: Annotated[Dtype | None, option("Type of the weights; unchanged by default")] = None,
    energy: Energy = 0.999,
    allow_partial: Partial = False,
    overwrite: Overwrite = False,
    quiet: Annotated[bool, option("Show only warnings and errors", "--quiet", "-q")] = False,
) -> None:
    """Add LoRAs to a checkpoint's weights; names in the file stay the same.

    \b
    iteris bake model.safetensors --lora cat.safetensors:0.8 -o baked.safetensors
    """
    concepts = [parse_concept(text, option="--lora") for text in lora]
    if not base.is_file():
        raise BaseError(
            f"The base {base} is not a file; give a .safetensors checkpoint. For a diffusers "
            "folder use diffusers: load_lora_weights, fuse_lora and save_pretrained."
        )
    if not all(concept.files for concept in concepts):
        raise UsageError("--lora must name a LoRA file.")
    for concept in concepts:
        check_used(concept, "weight", "prompts", "kind", "always_on", what="iteris bake")
        if concept.low is not None:
            raise UsageError(
                f"--lora {concept.file}+{concept.low} are for two models; bake each file into the "
                "checkpoint of its own."
            )
    check_base(str(base))
    check_concepts(concepts)
    files = [file for concept in concepts for file in concept.files]
    check_target(output, None, "float16", overwrite)
    check_apart([output], base, *files)
    model = released_base(architecture_of_file(*read_header(files[0])).name)
    places, reading = places_in(base, model), ReadOptions(allow_partial, energy)
    weight = weight_in(base, places)
    loras = [
        read_lora_file(file, model, weight, concept.options(reading))
        for file, concept in zip(files, concepts, strict=True)
    ]
    read = [replace(concept, lora=lora) for concept, lora in zip(concepts, loras, strict=True)]
    changes = changes_always(read)
    with progress_bars(visible=not quiet) as on_progress:

        def tick(done: int, total: int) -> None:
            on_progress(Progress("writing weights", done, total))

        bake_model(base, output, changes, places, DTYPES[dtype] if dtype else None, tick)
    if not quiet:
        for lora_read in loras:
            for note in lora_read.notes:
                typer.echo(f"{lora_read.name}: {note}")
        typer.echo(f"Wrote {output}: {len(changes)} layers changed.")
