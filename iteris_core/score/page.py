"""Score tables and pictures as one self-contained HTML page, for phones and screen readers too."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from string import Template

from PIL import Image

from .statistics import Stat

_PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
_SIDE = 320
"""Of a picture in the page, at most: two screen pixels for each of its widest cell."""


def html_table(
    columns: Sequence[str],
    rows: Mapping[str, Sequence[Stat | float | None]],
    own: str = "",
    caption: str = "Scores",
    apart: Collection[str] = (),
    low: Collection[str] = (),
) -> str:
    """A sortable table of three-digit figures, standard errors behind ±; row ``own`` is set off.

    The best of each column is marked, the least of those in ``low``; rows ``apart``, such as
    without any LoRA, are not in the running.
    """
    best = {
        index: _best(index, rows, apart, low=column in low) for index, column in enumerate(columns)
    }
    head = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{html.escape(name)}</button></th>'
        for name in ("method", *columns)
    )
    body: list[str] = []
    for name, values in rows.items():
        mark = ' class="own"' if name == own else ""
        cells = "".join(
            _cell(value, best=name == best[index]) for index, value in enumerate(values)
        )
        body.append(f'<tr{mark}><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    return _scrolled(
        f'<table class="scores">{_caption(caption)}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>",
        caption,
    )


def _best(
    column: int,
    rows: Mapping[str, Sequence[Stat | float | None]],
    apart: Collection[str],
    *,
    low: bool,
) -> str | None:
    """The row with the best figure of a column; None where fewer than two are in the running."""
    figures = {
        name: value.mean if isinstance(value, Stat) else value
        for name, values in rows.items()
        if name not in apart and (value := values[column]) is not None
    }
    if len(figures) < 2:
        return None
    return (min if low else max)(figures, key=lambda name: figures[name])


def _cell(value: Stat | float | None, *, best: bool) -> str:
    if value is None:
        return '<td><span class="unseen">none</span></td>'
    mean, error = (value.mean, value.se) if isinstance(value, Stat) else (value, math.nan)
    more = "" if math.isnan(error) else f" <small>± {error:.3f}</small>"
    share = min(max(mean, 0.0), 1.0)
    mark, said = (" data-best", '<span class="unseen"> best</span>') if best else ("", "")
    return f'<td data-value="{mean}"{mark} style="--share:{share:.3f}">{mean:.3f}{more}{said}</td>'


def html_gallery(
    rows: Mapping[str, Sequence[Image.Image | None]],
    columns: Sequence[str],
    caption: str,
    own: str = "",
) -> str:
    """Pictures by row and column, each with its own text for those who do not see it; None leaves
    a gap."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    body: list[str] = []
    for name, pictures in rows.items():
        mark = ' class="own"' if name == own else ""
        cells = "".join(
            "<td></td>"
            if picture is None
            else f"<td>{html_picture(picture, f'{name}: {label}')}</td>"
            for picture, label in zip(pictures, columns, strict=True)
        )
        body.append(f'<tr{mark}><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    return _scrolled(
        f'<table class="gallery">{_caption(caption)}<thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>",
        caption,
    )


def _caption(text: str) -> str:
    return f'<caption class="unseen">{html.escape(text)}</caption>'


def _scrolled(table: str, label: str) -> str:
    """What is too wide scrolls by itself; with ``tabindex`` the keyboard reaches it."""
    return (
        f'<div class="wide" role="region" aria-label="{html.escape(label)}" tabindex="0">'
        f"{table}</div>"
    )


def html_picture(picture: Image.Image, label: str) -> str:
    """The picture inside the page itself: small ones as PNG, others as JPEG at most 320 wide."""
    shown = picture.convert("RGB")
    shown.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    kind, data = ("png", png_bytes(shown)) if max(shown.size) <= 128 else ("jpeg", _jpeg(shown))
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    width, height = shown.size
    return (
        f'<img alt="{html.escape(label)}" width="{width}" height="{height}" '
        f'decoding="async" src="{source}">'
    )


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def html_details(summary: str, text: str) -> str:
    """Plain text that is folded away."""
    summary, text = html.escape(summary), html.escape(text)
    return f"<details><summary>{summary}</summary><pre>{text}</pre></details>"


def html_page(title: str, parts: Sequence[tuple[str, str]]) -> str:
    """``parts`` are (heading, HTML) in order; an empty heading leaves it out."""
    sections = "".join(
        "<section>" + (f"<h2>{html.escape(heading)}</h2>" if heading else "") + body + "</section>"
        for heading, body in parts
    )
    return _PAGE.substitute(title=html.escape(title), body=sections)
