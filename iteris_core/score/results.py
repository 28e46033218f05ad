"""What a comparison writes: figures as JSON, CSV and Markdown, pictures as a sheet and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean

from PIL import Image

from ..saving import atomically
from .compare import Comparison
from .page import html_details, html_gallery, html_page, html_table, png_bytes
from .sheet import contact_sheet
from .statistics import Rows, Stat, columns_of, csv_table, markdown_table, over_compositions

_LEAD = (
    "<p>image: mean CLIP cosine to the reference pictures of a concept. text: CLIP cosine to the "
    "prompt without its rare tokens. mean: half of each. {} A heading sorts.</p>"
)


def mean_rows(comparisons: Sequence[Comparison]) -> Rows:
    """method → column → value: of one composition its own, over its seeds; of several the means
    over them, with each composition's concepts taken together."""
    if len(comparisons) == 1:
        return comparisons[0].rows
    found: dict[str, dict[str, Stat]] = {}
    for method in comparisons[0].rows:
        rows = [_together(comparison.rows[method]) for comparison in comparisons]
        found[method] = {
            column: over_compositions([row[column] for row in rows]) for column in rows[0]
        }
    return found


def _together(row: Mapping[str, Stat]) -> dict[str, float]:
    """``image 1``, ``image 2``, … as one ``image``."""
    groups: dict[str, list[float]] = {}
    for column, stat in row.items():
        name, _, number = column.rpartition(" ")
        groups.setdefault(name if number.isdigit() else column, []).append(stat.mean)
    return {name: fmean(values) for name, values in groups.items()}


def write_results(comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    """comparison.json, .csv, .md, index.html and a sheet of each composition, all of them or none;
    returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = mean_rows(comparisons)
    names = [" + ".join(comparison.concepts) for comparison in comparisons]
    sheets = {
        "sheet.png" if len(names) == 1 else f"sheet-{number}.png": _sheet(comparison, name)
        for number, (comparison, name) in enumerate(zip(comparisons, names, strict=True), 1)
    }
    data = {
        **_figures(rows, comparisons[0]),
        "settings": comparisons[0].settings,
        **comparisons[0].made,
        "compositions": [
            {"concepts": list(c.concepts), **_figures(c.rows, c)} for c in comparisons
        ],
    }
    files = {
        "comparison.json": json.dumps(data, indent=1).encode(),
        "comparison.csv": csv_table(rows).encode(),
        "comparison.md": markdown_table(rows).encode(),
        "index.html": _page(rows, comparisons, names).encode(),
        **{name: png_bytes(sheet) for name, sheet in sheets.items()},
    }
    with ExitStack() as stack:
        for name, content in files.items():
            stack.enter_context(atomically(folder / name)).write_bytes(content)
    return [folder / name for name in files]


def _figures(rows: Rows, comparison: Comparison) -> dict[str, object]:
    methods = {n: {c: stat.to_dict() for c, stat in row.items()} for n, row in rows.items()}
    return {
        "methods": methods,
        "prompts": list(comparison.prompts),
        "seconds": dict(comparison.seconds),
    }


def _first(comparison: Comparison) -> dict[str, list[Image.Image]]:
    """method → the picture of every prompt's first seed."""
    every = len(next(iter(comparison.pictures.values()))) // len(comparison.prompts)
    return {name: list(some[::every]) for name, some in comparison.pictures.items()}


def _sheet(comparison: Comparison, title: str) -> Image.Image:
    cell = 192 if len(comparison.prompts) < 9 else 128
    return contact_sheet(_first(comparison), comparison.prompts, cell=cell, title=title)


def _page(rows: Rows, comparisons: Sequence[Comparison], names: Sequence[str]) -> str:
    several = len(comparisons) > 1
    over = f"{len(comparisons)} compositions" if several else "seeds"
    parts = [("", _LEAD.format(f"Means ± standard errors over {over}.") + _table(rows, "Scores"))]
    for comparison, name in zip(comparisons, names, strict=True):
        body = _table(comparison.rows, f"Scores of {name}") if several else ""
        body += html_gallery(
            _first(comparison), comparison.prompts, f"Pictures of {name}", "iteris"
        )
        parts.append((name, body))
    parts.append(("", html_details("How this was made", _made(comparisons[0]))))
    return html_page("LoRA merge methods compared", parts)


def _made(comparison: Comparison) -> str:
    """A line for each method, and for the calibration and the drawing."""
    lines: list[str] = []
    for name, values in {**comparison.settings, **comparison.made}.items():
        shown = ", ".join(f"{key}={value}" for key, value in values.items() if key != "templates")
        lines.append(f"{name}: {shown}")
    lines += [f"{name}: {seconds:.1f} s" for name, seconds in comparison.seconds.items()]
    return "\n".join(lines)


def _table(rows: Rows, caption: str) -> str:
    columns = columns_of(rows)
    cells = {name: [row.get(column) for column in columns] for name, row in rows.items()}
    return html_table(columns, cells, own="iteris", caption=caption)
