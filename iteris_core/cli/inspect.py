"""``iteris inspect``"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import OutputError
from ..lora_files import ReadOptions, read_tensors
from ..report.inspection import Interference, LoraFacts, describe, interference, plot_loras
from ..saving import atomically, check_new
from .base import lora_reader
from .common import print_table
from .options import AsJson, Overwrite, option

_PLOTS = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
_HEADINGS = ("pair", "row spaces", "column spaces", "conflict")
_BLOCK_HEADINGS = ("block", "layers", "norm", "share of energy")
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
    plot: Annotated[Path | None, option("Write a PNG of each block's content")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show what LoRA files contain, and where two of them will interfere.

    \b
    iteris inspect cat.safetensors dog.safetensors
    """
    if plot is not None:
        if plot.suffix.lower() not in _PLOTS:
            raise OutputError(f"--plot {plot}: the name must end in one of {', '.join(_PLOTS)}.")
        check_new(plot, overwrite=overwrite)
        if importlib.util.find_spec("matplotlib") is None:
            raise OutputError("--plot needs matplotlib: pip install matplotlib")
    options = ReadOptions(allow_partial=True, of_weight=False, vectors=True)
    read = lora_reader(base)
    tensors = [read_tensors(path)[0] for path in files]
    loras = [read(path, options) for path in files]
    facts = [describe(*pair) for pair in zip(loras, tensors, strict=True)]
    both = combinations(zip(loras, facts, strict=True), 2)
    pairs = [interference(a, b) for (a, of_a), (b, of_b) in both if of_a.base == of_b.base]
    if plot is not None:
        with atomically(plot) as unfinished:
            plot_loras(facts).savefig(unfinished)
    if as_json:
        data = {"files": [asdict(f) for f in facts], "interference": [asdict(p) for p in pairs]}
        typer.echo(json.dumps(data))
        return
    for fact in facts:
        print_table((), _fact_rows(fact), fact.name)
        rows = [(name, str(block.layers), f"{block.norm:.3g}", f"{block.share:.1%}")
                for name, block in fact.blocks.items()]  # fmt: skip
        print_table(_BLOCK_HEADINGS, rows, f"Blocks of {fact.name}")
    if pairs:
        print_table(_HEADINGS, _pair_rows(pairs), "Interference", _COLUMNS)
    for one, two in combinations(facts, 2):
        if one.base != two.base:
            typer.echo(
                f"{one.name} is a LoRA for {one.base}, {two.name} for {two.base}: they have no "
                "layer in common and cannot be merged."
            )


def _fact_rows(facts: LoraFacts) -> list[tuple[str, str]]:
    return [
        ("base", facts.base),
        ("layout", ", ".join(facts.layouts)),
        ("kind", _counts(facts.kinds)),
        ("dtype", _counts(facts.dtypes)),
        ("rank", _counts(facts.ranks)),
        ("alpha", _counts(facts.alphas)),
        ("sites", "; ".join(f"{c}: {n} of {m}" for c, (n, m) in facts.coverage.items())),
        ("trigger words", ", ".join(facts.triggers) or "none in the metadata"),
        *([("embeddings", ", ".join(facts.embeddings))] if facts.embeddings else []),
        *(("note", note) for note in facts.notes),
    ]


def _counts(counts: Mapping[Any, int]) -> str:
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} ({count} ×)" for value, count in counts.items())


def _pair_rows(pairs: Sequence[Interference]) -> Iterator[Sequence[str]]:
    for pair in pairs:
        name = f"{pair.first} / {pair.second}: {pair.shared or 'no'} shared sites"
        if not pair.shared:
            yield name, "", "", ""
            continue
        yield name, *(f"{figure:.3f}" for figure in (pair.rows, pair.columns, pair.conflict))
