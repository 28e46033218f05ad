"""Scores and images as one self-contained HTML page, also for phones and screen readers; for the
demo and the benchmarks."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import Environment, FileSystemLoader
from PIL import Image

_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
_PARTS: Any = _TEMPLATES.get_template("parts.html").module
_SIDE = 320
"""Largest side in pixels of an image on the page: twice the widest cell."""


def html_table(
    columns: Sequence[str],
    rows: Mapping[str, Sequence[Any]],
    highlighted: str = "",
    caption: str = "Scores",
    apart: Collection[str] = (),
    low: Collection[str] = (),
) -> str:
    """A sortable table of three-digit figures. A cell is a number, None, or anything with a
    ``mean`` and its error ``se``, which stands after ±.

    Row ``highlighted`` stands out. The best value of each column is marked, in columns ``low`` the
    smallest; rows ``apart``, such as the one without any LoRA, do not compete.
    """
    stats = {
        name: [
            SimpleNamespace(mean=v, se=math.nan) if isinstance(v, float | int) else v
            for v in values
        ]
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
    buffer = io.BytesIO()
    small.save(buffer, format=kind, optimize=kind == "PNG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    source = f"data:image/{kind.lower()};base64,{data}"
    return {"source": source, "width": small.width, "height": small.height}


def html_details(summary: str, text: str) -> str:
    """Collapsible plain text."""
    return _PARTS.details(summary, text)


def html_page(title: str, parts: Sequence[tuple[str, str]]) -> str:
    """``parts`` are (heading, HTML) in order; an empty heading is omitted."""
    return _TEMPLATES.get_template("page.html").render(title=title, parts=parts)
