"""Files of a comparison: figures as JSON, CSV and Markdown, images as a sheet and a page."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from PIL import Image

from ..errors import OutputError, SaveError, brief
from ..saving import together
from .compare import Comparison
from .page import html_details, html_gallery, html_page, html_table, picture_bytes
from .row_scores import ALONE, BASE
from .sheet import contact_sheet
from .statistics import Rows, Stat, columns_of, csv_table, markdown_table, over_compositions

OWN = "iteris"
"""The row that pages highlight."""
_FIGURES = "comparison.json"
_LEAD = (
    "<p>image: mean CLIP cosine to the reference pictures of a concept, on the prompts that name "
    "it and no other (or, without such, on all that name it). text: CLIP cosine to the prompt "
    "without its rare tokens. mean: half of each. The best merge of each column is marked; no LoRA "
    "and each LoRA alone are there to compare with. {} A heading sorts.</p>"
)


def mean_rows(comparisons: Sequence[Comparison]) -> Rows:
    """Method → column → value. For one composition, over its seeds; for several, means over them,
    with each composition's concepts, and its LoRAs alone, pooled."""
    if len(comparisons) == 1:
        return comparisons[0].rows
    together = [_together(comparison) for comparison in comparisons]
    means: dict[str, dict[str, Stat]] = {}
    for method in together[0]:
        rows = [rows[method] for rows in together if method in rows]
        means[method] = {
            column: over_compositions([row[column] for row in rows]) for column in rows[0]
        }
    return means


def _together(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Pool ``image sks``, ``image zwx``, … into one ``image``, and likewise the rows ``alone sks``,
    …"""

    def common(name: str) -> str:
        first, _, label = name.partition(" ")
        return first if label in comparison.concepts else name

    values: dict[str, dict[str, list[float]]] = {}
    for method, row in comparison.rows.items():
        groups = values.setdefault(common(method), {})
        for column, stat in row.items():
            groups.setdefault(common(column), []).append(stat.mean)
    return {
        method: {column: fmean(figures) for column, figures in groups.items()}
        for method, groups in values.items()
    }


def check_results_folder(folder: Path, *, overwrite: bool) -> None:
    """Before any work is done, raise :class:`IterisError` if :func:`write_results` could not write,
    or would replace the results of another comparison. Creates nothing."""
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


def write_results(comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    """Write comparison.json, .csv, .md, index.html and a sheet per composition, all of them or
    none; returns the paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{folder} cannot be created ({brief(error)}); give another folder.") from (
            error
        )
    rows = mean_rows(comparisons)
    names = [" + ".join(comparison.concepts) for comparison in comparisons]
    sheets = {
        "sheet.png" if len(names) == 1 else f"sheet-{number}.png": contact_sheet(
            _first(one), one.prompts, cell=192 if len(one.prompts) < 9 else 128, title=name
        )
        for number, (one, name) in enumerate(zip(comparisons, names, strict=True), 1)
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
        _FIGURES: json.dumps(data, indent=1).encode(),
        "comparison.csv": csv_table(rows).encode(),
        "comparison.md": markdown_table(rows).encode(),
        "index.html": _page(rows, comparisons, names).encode(),
        **{name: picture_bytes(sheet) for name, sheet in sheets.items()},
    }
    with together() as beside:
        for name, content in files.items():
            beside(folder / name).write_bytes(content)
    return [folder / name for name in files]


def _figures(rows: Rows, comparison: Comparison) -> dict[str, object]:
    methods = {n: {c: stat.to_dict() for c, stat in row.items()} for n, row in rows.items()}
    return {
        "methods": methods,
        "prompts": list(comparison.prompts),
        "seconds": dict(comparison.seconds),
    }


def _in_order(names: Iterable[str]) -> list[str]:
    """The given order, but with each LoRA alone directly after iteris, for comparison."""
    given = list(names)
    alone = [name for name in given if name.partition(" ")[0] == ALONE]
    if OWN not in given:
        return given
    others = [name for name in given if name not in alone]
    place = others.index(OWN) + 1
    return [*others[:place], *alone, *others[place:]]


def _first(comparison: Comparison) -> dict[str, list[Image.Image | None]]:
    """Method → the image of every prompt's first seed."""
    every = len(next(iter(comparison.pictures.values()))) // len(comparison.prompts)
    pictures = comparison.pictures
    return {name: list(pictures[name][::every]) for name in _in_order(pictures)}


def _page(rows: Rows, comparisons: Sequence[Comparison], names: Sequence[str]) -> str:
    several = len(comparisons) > 1
    over = f"{len(comparisons)} compositions" if several else "seeds"
    parts = [("", _LEAD.format(f"Means ± standard errors over {over}.") + _table(rows, "Scores"))]
    for comparison, name in zip(comparisons, names, strict=True):
        body = _table(comparison.rows, f"Scores of {name}") if several else ""
        body += html_gallery(_first(comparison), comparison.prompts, f"Pictures of {name}", OWN)
        parts.append((name, body))
    parts.append(("", html_details("How this was made", _made(comparisons[0]))))
    return html_page("LoRA merge methods compared", parts)


def _made(comparison: Comparison) -> str:
    """One line per method, and for the calibration and the drawing."""
    lines: list[str] = []
    for name, values in {**comparison.settings, **comparison.made}.items():
        text = ", ".join(f"{key}={value}" for key, value in values.items() if key != "templates")
        lines.append(f"{name}: {text}")
    lines += [f"{name}: {seconds:.1f} s" for name, seconds in comparison.seconds.items()]
    return "\n".join(lines)


def _table(rows: Rows, caption: str) -> str:
    columns = columns_of(rows)
    cells = {name: [rows[name].get(column) for column in columns] for name in _in_order(rows)}
    apart = [name for name in rows if name.partition(" ")[0] in (ALONE, BASE)]
    return html_table(columns, cells, OWN, caption, apart=apart, low=["collapsed"])
