"""The grid of prompts and timesteps in ``docs/results.md``, by :mod:`reported_grid`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from markdown_tables import cell, lines, load, signed
from result_plots import Plot, bars
from tables_protocol import nearest

METHODS = ("iteris", "regmean++", "ssr")
ACROSS = {"single": "each LoRA alone", "base": "no LoRA"}


def section() -> str:
    data = load("reported_grid.json")
    shown = "\n\n".join(
        f"![Image alignment by prompts x timesteps, {size} concepts.](images/{_file(size)})"
        for size in _sizes(data)
    )
    return f"""\
## How few prompts are enough

The ten concepts on which nothing was chosen again, by prompts x timesteps a LoRA:
`python benchmarks/reported_grid.py`, three replicates, each with LoRAs and prompts of other seeds.
*ahead* is by how much IterIS is ahead of the better of the two in image alignment, set by set; in
each replicate there are five sets of two, two of five and one of ten. Between the ends of the grid
RegMean++ and SSR-Merge have the settings of the nearer end. Behind are two by two at two concepts,
by two standard errors, and one prompt at ten, by less than one.

{shown}

{_table(data)}
"""


def plots() -> list[Plot]:
    data = load("reported_grid.json")
    return [
        bars(
            _file(size),
            {
                point: {
                    name: _shown(rows[name]["image"])
                    for name in (*METHODS, *ACROSS)
                    if name in rows
                }
                for at, point, rows in _rows(data)
                if at == size
            },
            f"image alignment, {size} concepts",
            ACROSS,
            "prompts x timesteps",
        )
        for size in _sizes(data)
    ]


def _file(size: str) -> str:
    return f"results-grid-{size}.svg"


def _shown(value: Mapping[str, Any]) -> dict[str, Any]:
    known = value["interval"] if value["n"] > 2 else None
    return {"mean": value["mean"], "interval": known or [value["mean"]] * 2}


def _sizes(data: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(size for size, *_ in _rows(data)))


def _rows(data: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Size, point of the grid and its rows."""
    sizes = dict.fromkeys(size for some in data["grid"].values() for size in some)
    for size in sorted(sizes, key=int):
        for point, some in data["grid"].items():
            if "iteris" in some.get(size, {}):
                yield size, point, some[size]


def _table(data: Mapping[str, Any]) -> str:
    rows = [
        (
            size,
            point,
            *(cell(some.get(name, {}).get("image")) for name in METHODS),
            signed(lead[1]["image"]) if (lead := nearest(some)) else "",
            *(cell(some.get(name, {}).get("text")) for name in ("base", *METHODS)),
        )
        for size, point, some in _rows(data)
    ]
    names = [f"image: {METHODS[0]}", *METHODS[1:]]
    head = ("concepts", "prompts x timesteps", *names, "ahead", "text: no LoRA", *METHODS)
    return "\n".join(lines(head, rows))
