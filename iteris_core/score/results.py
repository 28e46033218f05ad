"""Files of a comparison: figures as JSON and Markdown, and images as a labelled sheet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..errors import OutputError
from ..saving import check_new, check_place, together
from .compare import Comparison
from .measures import markdown_table

FIGURES = "comparison.json"


def check_results_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a folder that cannot be written or has other results."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give a folder for the results.")
    if folder.is_dir():
        check_new(folder / FIGURES, overwrite=overwrite)
    else:
        check_place(folder)


def write_results(comparison: Comparison, folder: Path) -> None:
    """Write comparison.json, comparison.md and sheet.png, all or none."""
    folder.mkdir(exist_ok=True)
    prompts, rows = comparison.prompts, comparison.rows
    every = len(next(iter(comparison.pictures.values()))) // len(prompts)
    first = {row: images[::every] for row, images in comparison.pictures.items()}  # seeds
    data = {
        "concepts": list(comparison.concepts),
        "methods": {
            row: {column: stat.to_dict() for column, stat in stats.items()}
            for row, stats in rows.items()
        },
        "prompts": list(prompts),
        "seconds": comparison.seconds,
        "settings": comparison.settings,
        **comparison.made,
    }
    cell, title = 192 if len(prompts) < 9 else 128, " + ".join(comparison.concepts)
    sheet = contact_sheet(first, prompts, cell=cell, title=title)
    with together() as beside:
        beside(folder / FIGURES).write_bytes(json.dumps(data, indent=1).encode())
        beside(folder / "comparison.md").write_bytes(markdown_table(rows).encode())
        sheet.save(beside(folder / "sheet.png"), format="PNG", optimize=True)


def contact_sheet(
    rows: Mapping[str, Sequence[Image.Image | None]],
    columns: Sequence[str],
    *,
    cell: int = 128,
    title: str = "",
) -> Image.Image:
    """One row per label of ``rows``, one column per label of ``columns``; None leaves a gap.

    Images are scaled to ``cell`` pixels; column labels wrap to the width of a cell.
    """
    small, large = ImageFont.load_default(12), ImageFont.load_default(16)
    gap, left = 4, 8 + max(int(large.getlength(label)) for label in rows)
    labels = [_wrapped(label, small, cell) for label in columns]
    heading = 28 if title else 8
    top = heading + 15 * max(len(lines) for lines in labels) + 6
    width = left + len(columns) * (cell + gap) + 4
    sheet = Image.new("RGB", (width, top + len(rows) * (cell + gap) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((8, 5), title, fill="black", font=large)
    for index, lines in enumerate(labels):
        x = left + index * (cell + gap)
        for number, line in enumerate(lines):
            pen.text((x, heading + 15 * number), line, fill="#333", font=small)
    for row, (label, pictures) in enumerate(rows.items()):
        y = top + row * (cell + gap)
        pen.text((4, y + cell // 2 - 10), label, fill="black", font=large)
        for index, picture in enumerate(pictures):
            if picture is not None:
                scaled = picture.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS)
                sheet.paste(scaled, (left + index * (cell + gap), y))
    return sheet


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
