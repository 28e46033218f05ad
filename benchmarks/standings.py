"""The standings of the open benchmark, as one sortable page.

``python benchmarks/standings.py`` writes ``build/standings.html`` of the methods in
``results/open/`` and of those in ``results/unseen_reported.json``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markdown_tables import runs_of
from outputs import BUILD, RESULTS, read
from seeds import Stat

from toybox.page import html_page, html_table

OURS = "iteris"
NAMES = {"single": "each LoRA alone", "base": "no LoRA", "sum": "all loaded at once"}
APART = ("each LoRA alone", "no LoRA")
COLUMNS: Sequence[tuple[str, str, str]] = (
    ("likeness kept", "new words", "likeness kept"),
    ("likeness", "new words", "likeness"),
    ("likeness by DINO", "new words", "dino"),
    ("text", "new words", "text"),
    ("attributes", "new words", "judge"),
    ("backgrounds", "new words", "scene"),
    ("base kept without a trigger", "no trigger", "likeness"),
    ("spread of pictures", "spread", "share of pixels"),
)
COSTS = {"seconds": ("seconds", 1), "rank": ("rank", 1), "MiB": ("bytes", 2**20)}
"""Heading → what a run has of it, and its unit"""
_REPORTED = "Ten LoRAs on which nothing was chosen"
_LEAD = """<p>{}, drawn on prompts whose words no calibration
prompt had. Means over n sets of LoRAs; ± half of a 95 % interval over concepts or trainings,
whichever is wider. A click on a heading sorts.</p>"""


def rows(
    size: str, world: str = "reported", folder: Path = RESULTS
) -> dict[str, list[Stat | float | None]]:
    """Method → the cells of :data:`COLUMNS` and the costs, the most likeness first, of what is
    measured in a ``folder`` laid out as ``results/``."""
    found: list[tuple[str, Mapping[str, Any], Mapping[str, float]]] = []
    known = _known(world, folder)
    for name, of in known.get(size, {"rows": {}})["rows"].items():
        runs = runs_of(f"unseen_{world}_runs.jsonl", name, int(size), folder)
        found.append((NAMES.get(name, name), of, costs(runs)))
    for entry in _open(world, folder):
        of = entry["sizes"].get(size)
        if of:
            found.append((entry["method"], of["figures"], of["costs"]))
    found.sort(key=lambda row: -row[1]["new words"]["likeness"]["mean"])
    return {
        f"{name}, n = {of['new words']['likeness']['sets']}": [
            *(_stat(of.get(kind, {}).get(figure)) for _, kind, figure in COLUMNS),
            *(taken[cost] / unit if taken else None for cost, unit in COSTS.values()),
        ]
        for name, of, taken in found
    }


def _stat(figure: Mapping[str, Any] | None) -> Stat | None:
    if figure is None:
        return None
    ends = figure["interval"]
    return Stat(figure["mean"], ends[1] - figure["mean"] if ends else math.nan)


def _known(world: str, folder: Path) -> Mapping[str, Any]:
    return read(folder / f"unseen_{world}.json").get("sizes", {})


def _open(world: str, folder: Path) -> list[Mapping[str, Any]]:
    every = [read(file) for file in sorted((folder / "open").glob("*.json"))]
    return [entry for entry in every if entry["world"] == world]


def costs(entries: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Means of runs; nothing where nothing was merged."""
    every = list(entries)
    return {cost: fmean(entry[cost] for entry in every) for cost, _ in COSTS.values() if every}


def page(world: str = "reported", folder: Path = RESULTS) -> str:
    lead = _REPORTED if world == "reported" else f"The LoRAs of {world}"
    parts = [("", _LEAD.format(lead))]
    known = [_known(world, folder), *(entry["sizes"] for entry in _open(world, folder))]
    for size in sorted({size for of in known for size in of}, key=int):
        found = rows(size, world, folder)
        heads = [head for head, _, _ in COLUMNS] + list(COSTS)
        used = [i for i in range(len(heads)) if any(of[i] is not None for of in found.values())]
        cells = {label: [of[i] for i in used] for label, of in found.items()}
        ours = next((label for label in found if label.startswith(f"{OURS}, n")), "")
        apart = [label for label in found if label.partition(", n")[0] in APART]
        heads = [heads[i] for i in used]
        table = html_table(heads, cells, ours, f"{size} LoRAs", apart=apart, low=list(COSTS))
        parts.append((f"{size} LoRAs", table))
    return html_page("Merging LoRAs: standings on new words", parts)


def main() -> None:
    path = BUILD / "standings.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
