"""Files of a comparison: figures as JSON and Markdown, images as a sheet and a page."""

from __future__ import annotations

import json
import os
from pathlib import Path

from PIL import Image

from ..errors import OutputError, SaveError, brief
from ..saving import together
from .compare import Comparison
from .page import html_details, html_gallery, html_page, html_table, picture_bytes
from .row_scores import ALONE, BASE
from .sheet import contact_sheet
from .statistics import columns_of, markdown_table

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


def write_results(comparison: Comparison, folder: Path) -> list[Path]:
    """Write comparison.json, .md, index.html and sheet.png, all of them or none; returns the
    paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{folder} cannot be created ({brief(error)}); give another folder.") from (
            error
        )
    prompts = comparison.prompts
    data = {
        "concepts": list(comparison.concepts),
        "methods": {
            name: {column: stat.to_dict() for column, stat in row.items()}
            for name, row in comparison.rows.items()
        },
        "prompts": list(prompts),
        "seconds": comparison.seconds,
        "settings": comparison.settings,
        **comparison.made,
    }
    sheet = contact_sheet(
        _first(comparison),
        prompts,
        cell=192 if len(prompts) < 9 else 128,
        title=" + ".join(comparison.concepts),
    )
    files = {
        _FIGURES: json.dumps(data, indent=1).encode(),
        "comparison.md": markdown_table(comparison.rows).encode(),
        "index.html": _page(comparison).encode(),
        "sheet.png": picture_bytes(sheet),
    }
    with together() as beside:
        for name, content in files.items():
            beside(folder / name).write_bytes(content)
    return [folder / name for name in files]


def _first(comparison: Comparison) -> dict[str, list[Image.Image | None]]:
    """Method → the image of every prompt's first seed."""
    every = len(next(iter(comparison.pictures.values()))) // len(comparison.prompts)
    return {name: images[::every] for name, images in comparison.pictures.items()}


def _page(comparison: Comparison) -> str:
    rows, name = comparison.rows, " + ".join(comparison.concepts)
    columns = columns_of(rows)
    cells = {row: [rows[row].get(column) for column in columns] for row in rows}
    apart = [row for row in rows if row.partition(" ")[0] in (ALONE, BASE)]
    gallery = html_gallery(_first(comparison), comparison.prompts, f"Pictures of {name}", OWN)
    made = [
        f"{of}: {', '.join(f'{key}={values[key]}' for key in values if key != 'templates')}"
        for of, values in {**comparison.settings, **comparison.made}.items()
    ]
    made += [f"{row}: {seconds:.1f} s" for row, seconds in comparison.seconds.items()]
    return html_page(
        "LoRA merge methods compared",
        [
            ("", _LEAD + html_table(columns, cells, OWN, apart=apart)),
            (name, gallery),
            ("", html_details("How this was made", "\n".join(made))),
        ],
    )
