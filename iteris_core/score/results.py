"""Files of a comparison: figures as JSON and Markdown, images as a labelled sheet and as one
self-contained HTML page, also for phones and screen readers."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from PIL import Image, ImageDraw, ImageFont

from ..errors import OutputError, SaveError, brief
from ..saving import together
from .compare import Comparison
from .measures import ALONE, BASE, Stat, columns_of, markdown_table

_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
_PARTS: Any = _TEMPLATES.get_template("parts.html").module
_SIDE = 320
"""Largest side in pixels of an image on the page: twice the widest cell."""
OWN = "iteris"
"""The row that pages highlight."""
_FIGURES = "comparison.json"
_LEAD = (
    "<p>image: mean CLIP cosine to the reference pictures of a concept, on the prompts that name "
    "it and no other (or, without such, on all that name it). text: CLIP cosine to the prompt "
    "without its rare tokens. mean: half of each. The best merge of each column is marked; no LoRA "
    "and each LoRA alone are there to compare with. Means ± standard errors over seeds. A heading "
    "sorts.</p>"
)


def check_results_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a folder that cannot be written or has other results."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give a folder for the results.")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise SaveError(f"{folder} cannot be created: {there} is not a writable folder.")
    if not overwrite and (folder / _FIGURES).exists():
        raise OutputError(
            f"{folder} has the results of a comparison; give another folder, or overwrite them "
            "(option overwrite)."
        )


def write_results(comparison: Comparison, folder: Path) -> list[Path]:
    """Write comparison.json, .md, index.html and sheet.png, all or none; returns the paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{folder} cannot be created ({brief(error)}); give another folder.") from (
            error
        )
    prompts, rows, name = comparison.prompts, comparison.rows, " + ".join(comparison.concepts)
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
    columns = columns_of(rows)
    cells = {row: [stats.get(column) for column in columns] for row, stats in rows.items()}
    apart = [row for row in rows if row.partition(" ")[0] in (ALONE, BASE)]
    made = [
        f"{of}: {', '.join(f'{key}={values[key]}' for key in values if key != 'templates')}"
        for of, values in {**comparison.settings, **comparison.made}.items()
    ]
    made += [f"{row}: {seconds:.1f} s" for row, seconds in comparison.seconds.items()]
    parts = [
        ("", _LEAD + html_table(columns, cells, OWN, apart=apart)),
        (name, html_gallery(first, prompts, f"Pictures of {name}", OWN)),
        ("", html_details("How this was made", "\n".join(made))),
    ]
    sheet = contact_sheet(first, prompts, cell=192 if len(prompts) < 9 else 128, title=name)
    files = {
        _FIGURES: json.dumps(data, indent=1).encode(),
        "comparison.md": markdown_table(rows).encode(),
        "index.html": html_page("LoRA merge methods compared", parts).encode(),
        "sheet.png": picture_bytes(sheet),
    }
    with together() as beside:
        for file, content in files.items():
            beside(folder / file).write_bytes(content)
    return [folder / file for file in files]


def html_table(
    columns: Sequence[str],
    rows: Mapping[str, Sequence[Stat | float | None]],
    highlighted: str = "",
    caption: str = "Scores",
    apart: Collection[str] = (),
    low: Collection[str] = (),
) -> str:
    """A sortable table of three-digit figures, with standard errors after ±.

    Row ``highlighted`` stands out. The best value of each column is marked, in columns ``low`` the
    smallest; rows ``apart``, such as the one without any LoRA, do not compete.
    """
    stats = {
        name: [Stat(v, math.nan) if isinstance(v, float | int) else v for v in values]
        for name, values in rows.items()
    }
    best: list[str | None] = []
    for index, column in enumerate(columns):
        known = {name: stat.mean for name, row in stats.items() if (stat := row[index])}
        running = [name for name in known if name not in apart]
        first = (min if column in low else max)(running, key=lambda n: known[n], default=None)
        best.append(first if len(running) > 1 else None)
    return _PARTS.table(list(columns), stats, highlighted, caption, best)


def html_gallery(
    rows: Mapping[str, Sequence[Image.Image | None]],
    columns: Sequence[str],
    caption: str,
    highlighted: str = "",
) -> str:
    """Images by row and column, each with alt text; None leaves a gap."""
    pictures = {name: [one and _embedded(one) for one in row] for name, row in rows.items()}
    return _PARTS.gallery(columns, pictures, highlighted, caption)


def _embedded(picture: Image.Image) -> dict[str, str | int]:
    """An image with its size for the page: PNG if small, otherwise JPEG."""
    small = picture.convert("RGB")
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    kind = "PNG" if max(small.size) <= 128 else "JPEG"
    data = base64.b64encode(picture_bytes(small, kind)).decode()
    source = f"data:image/{kind.lower()};base64,{data}"
    return {"source": source, "width": small.width, "height": small.height}


def picture_bytes(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, optimize=kind == "PNG", quality=88)
    return buffer.getvalue()


def html_details(summary: str, text: str) -> str:
    """Collapsible plain text."""
    return _PARTS.details(summary, text)


def html_page(title: str, parts: Sequence[tuple[str, str]]) -> str:
    """``parts`` are (heading, HTML) in order; an empty heading is omitted."""
    return _TEMPLATES.get_template("page.html").render(title=title, parts=parts)


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
    labels = [_wrap(label, small, cell) for label in columns]
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


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
