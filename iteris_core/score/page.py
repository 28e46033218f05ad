"""A score table and pictures as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1200px;padding:1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.wide{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse}
th,td{padding:.35rem .8rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}th{cursor:pointer;white-space:nowrap}
tr.own{font-weight:600;background:#f1f6ff}img{display:block;max-width:none}
p{max-width:70ch}small{color:#666;font-weight:400}td{white-space:nowrap}"""

_SORT = """
document.querySelectorAll('th').forEach(th=>th.onclick=()=>{
const body=th.closest('table').tBodies[0],i=th.cellIndex;
const up=th.dataset.up=th.dataset.up?'':'1';
[...body.rows].sort((a,b)=>{
const v=r=>r.cells[i].dataset.value??r.cells[i].textContent,
x=v(a),y=v(b);
const d=isNaN(x)||isNaN(y)?x.localeCompare(y):x-y;return up?d:-d}).forEach(r=>body.append(r))})"""


def html_table(
    columns: Sequence[str],
    rows: Mapping[str, Sequence[float | None]],
    own: str = "",
    errors: Mapping[str, Sequence[float | None]] | None = None,
) -> str:
    """A sortable table of three-digit figures, with ``errors`` behind ±; row ``own`` is set off."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *columns))
    body: list[str] = []
    for name, values in rows.items():
        spread = errors[name] if errors is not None else [None] * len(values)
        cells = "".join(_cell(v, se) for v, se in zip(values, spread, strict=True))
        mark = ' class="own"' if name == own else ""
        body.append(f"<tr{mark}><td>{html.escape(name)}</td>{cells}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return "<td></td>"
    more = "" if error is None else f" <small>± {error:.3f}</small>"
    return f'<td data-value="{value}">{value:.3f}{more}</td>'


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
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{sections}<script>{_SORT}</script></body></html>"
    )
