"""The grid of prompts and timesteps in ``docs/results.md``, by :mod:`reported_grid`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from markdown_tables import cell, lines, load, signed
from result_plots import Plot, bars

METHODS = ("iteris", "regmean++", "ssr")
PLOTS = {"image": "image alignment", "text": "text alignment"}
ACROSS = {"single": "each LoRA alone", "base": "no LoRA"}


def section() -> str:
    data = load("reported_grid.json")
    shown = "\n\n".join(
        f"![{said} by prompts x timesteps and the number of concepts K.](images/{_file(column)})"
        for column, said in PLOTS.items()
    )
    return f"""\
## How few prompts are enough

The ten concepts on which nothing was chosen again, by prompts x timesteps a LoRA:
`python benchmarks/reported_grid.py`. *ahead* is by how much IterIS is ahead of the better of the
two in image alignment, set by set. Between the ends of the grid RegMean++ and SSR-Merge have the
settings of the nearer end.

{shown}

{_table(data)}
"""


def plots() -> list[Plot]:
    data = load("reported_grid.json")
    return [
        bars(
            _file(column),
            {
                f"{point}\nK = {size}": {
                    name: _shown(rows[name][column]) for name in (*METHODS, *ACROSS) if name in rows
                }
                for size, point, rows, _ in _rows(data)
            },
            said,
            ACROSS,
            "prompts x timesteps, and the number of concepts K",
        )
        for column, said in PLOTS.items()
    ]


def _file(column: str) -> str:
    return f"results-grid-{column}.svg"


def _shown(value: Mapping[str, Any]) -> dict[str, Any]:
    return {"mean": value["mean"], "interval": value["interval"] or [value["mean"]] * 2}


def _rows(data: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any], Any]]:
    """Size, point of the grid, its rows and the lead."""
    sizes = dict.fromkeys(size for some in data["grid"].values() for size in some)
    for size in sorted(sizes, key=int):
        for point, some in data["grid"].items():
            if "iteris" in some.get(size, {}):
                yield size, point, some[size], data["leads"][point].get(size)


def _table(data: Mapping[str, Any]) -> str:
    rows = [
        (
            size,
            point,
            *(cell(some.get(name, {}).get("image")) for name in METHODS),
            signed(lead["image"]) if lead else "",
            *(cell(some.get(name, {}).get("text")) for name in ("base", *METHODS)),
        )
        for size, point, some, lead in _rows(data)
    ]
    names = [f"image: {METHODS[0]}", *METHODS[1:]]
    head = ("concepts", "prompts x timesteps", *names, "ahead", "text: no LoRA", *METHODS)
    return "\n".join(lines(head, rows))
