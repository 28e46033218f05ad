"""A score table and pictures as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from PIL import Image

from .statistics import Stat

_PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


def html_table(
    columns: Sequence[str], rows: Mapping[str, Sequence[Stat | float | None]], own: str = ""
) -> str:
    """A sortable table of three-digit figures, standard errors behind ±; row ``own`` is set off."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *columns))
    body: list[str] = []
    for name, values in rows.items():
        mark = ' class="own"' if name == own else ""
        cells = "".join(_cell(value) for value in values)
        body.append(f"<tr{mark}><td>{html.escape(name)}</td>{cells}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(value: Stat | float | None) -> str:
    if value is None:
        return "<td></td>"
    mean, error = (value.mean, value.se) if isinstance(value, Stat) else (value, math.nan)
    more = "" if math.isnan(error) else f" <small>± {error:.3f}</small>"
    return f'<td data-value="{mean}">{mean:.3f}{more}</td>'


def html_picture(picture: Image.Image, label: str) -> str:
    """The picture inside the page itself, as PNG."""
    data = base64.b64encode(png_bytes(picture)).decode()
    source = f"data:image/png;base64,{data}"
    return f'<div class="wide"><img alt="{html.escape(label)}" src="{source}"></div>'


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def html_page(title: str, parts: Sequence[tuple[str, str]]) -> str:
    """``parts`` are (heading, HTML) in order; an empty heading leaves it out."""
    sections = "".join(
        (f"<h2>{html.escape(heading)}</h2>" if heading else "") + body for heading, body in parts
    )
    return _PAGE.substitute(title=html.escape(title), body=sections)
