"""``iteris score``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from . import options as shared
from .base import device_of
from .common import print_table
from .inputs import open_images, read_lines
from .options import option


def score(
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images")],
    refs: Annotated[Path | None, option("A folder of reference images")] = None,
    prompts: Annotated[
        Path | None, option("A text file: one prompt per image, or one for all")
    ] = None,
    clip: Annotated[str, option("An open_clip architecture, or local-dir:FOLDER")] = "ViT-L-14",
    clip_weights: Annotated[
        str | None, option("A weights file or an open_clip tag; default: openai")
    ] = None,
    device: shared.Device = None,
    as_json: shared.AsJson = False,
) -> None:
    """Measure CLIP image and text alignment of images: raw cosine and the CLIPScore scale.

    \b
    iteris score pictures --refs references --prompts prompts.txt
    """
    from ..score import ClipScorer, clip_score

    if refs is None and prompts is None:
        raise UsageError("Nothing to score against: give --refs, --prompts or both.")
    files, pictures = open_images(*images)
    references = open_images(refs)[1] if refs is not None else None
    lines = read_lines(prompts) if prompts is not None else None
    if lines is not None and len(lines) not in (1, len(pictures)):
        raise UsageError(
            f"{prompts} has {len(lines)} prompts for {len(pictures)} images; write one per image, "
            "or one for all."
        )
    columns: dict[str, Any] = {}
    device = device_of(device)
    scorer = ClipScorer.load(clip, clip_weights, device=device)
    if references is not None:
        columns["image"] = scorer.image_alignment(pictures, references)
    if lines is not None:
        lines = lines * len(pictures) if len(lines) == 1 else lines
        columns["text"] = scorer.text_alignment(pictures, lines)
        columns["clipscore"] = clip_score(columns["text"])
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    rows = [dict(zip(columns, row, strict=True)) for row in values]
    means = {name: float(column.mean()) for name, column in columns.items()}
    if as_json:
        named = [{"file": str(file), **row} for file, row in zip(files, rows, strict=True)]
        typer.echo(json.dumps({"pictures": named, "mean": means}))
        return
    names = [*(file.name for file in files), "mean"]
    cells = [[f"{value:.4f}" for value in row.values()] for row in (*rows, means)]
    print_table(("picture", *columns), [[n, *row] for n, row in zip(names, cells, strict=True)])
