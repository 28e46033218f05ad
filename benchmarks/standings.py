"""The standings of the open benchmark, as one sortable page.

``python benchmarks/standings.py`` writes ``build/standings.html`` of the methods in
``results/open/`` and of those in ``results/unseen_reported.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markdown_tables import load, load_rows
from outputs import BUILD, RESULTS
from protocol.plan import Variant

from iteris_core.score.page import html_page, html_table
from iteris_core.score.statistics import Stat

OURS = "iteris"
NAMES = {"single": "each LoRA alone", "base": "no LoRA", "sum": "all loaded at once"}
APART = ("each LoRA alone", "no LoRA")
COLUMNS: Sequence[tuple[str, str, str]] = (
    ("likeness kept", "new words", "likeness kept"),
    ("likeness", "new words", "likeness"),
    ("attributes", "new words", "judge"),
    ("backgrounds", "new words", "scene"),
    ("base kept without a trigger", "no trigger", "likeness"),
    ("spread of pictures", "spread", "share of pixels"),
)
COSTS = {"seconds": 1.0, "rank": 1.0, "MiB": 2.0**20}
_LEAD = """<p>Ten LoRAs on which nothing was chosen, drawn on prompts whose words no calibration
prompt had. Means over n sets of LoRAs; ± half of a 95 % interval (Student's t), where there are two
sets or more. A click on a heading sorts.</p>"""


def rows(size: str) -> dict[str, list[Stat | float | None]]:
    """Method → the cells of :data:`COLUMNS` and the costs, the most likeness first."""
    found: dict[str, list[Stat | float | None]] = {}
    known = load("unseen_reported.json")["sizes"]
    for name, of in known.get(size, {"rows": {}})["rows"].items():
        label = f"{NAMES.get(name, name)}, n = {_sets(of)}"
        found[label] = [*_cells(of), *_costs(_of_runs(name, int(size)))]
    for file in sorted((RESULTS / "open").glob("*.json")):
        entry = json.loads(file.read_text(encoding="utf-8"))
        of = entry["sizes"].get(size)
        if of and entry["world"] == "reported":
            label = f"{entry['method']}, n = {_sets(of['figures'])}"
            found[label] = [*_cells(of["figures"]), *_costs([of["costs"]])]
    return dict(sorted(found.items(), key=lambda item: -_mean(item[1][1])))


def _cells(of: Mapping[str, Any]) -> list[Stat | float | None]:
    cells: list[Stat | float | None] = []
    for _, kind, name in COLUMNS:
        figure = of.get(kind, {}).get(name)
        if figure is None:
            cells.append(None)
            continue
        ends = figure["interval"]
        cells.append(Stat(figure["mean"], ends[1] - figure["mean"] if ends else math.nan))
    return cells


def _sets(of: Mapping[str, Any]) -> int:
    return of["new words"]["likeness"]["n"]


def _of_runs(label: str, size: int) -> list[Mapping[str, Any]]:
    """The kept runs of a row."""
    variant = Variant.parsed(label)
    wanted = [variant.method, dict(variant.settings), dict(variant.calibration)]
    runs: list[Mapping[str, Any]] = []
    for entry in load_rows("unseen_reported_runs.jsonl"):
        method, names, _, settings, _, calibration = json.loads(entry["key"])
        if [method, settings, calibration] == wanted and len(names) == size:
            runs.append(entry)
    return runs


def _costs(entries: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Means of seconds, rank and MiB; nothing where nothing was merged."""
    if not entries:
        return [None] * len(COSTS)
    return [
        fmean(entry[cost] for entry in entries) / unit
        for cost, unit in zip(("seconds", "rank", "bytes"), COSTS.values(), strict=True)
    ]


def _mean(value: Stat | float | None) -> float:
    return value.mean if isinstance(value, Stat) else value or 0.0


def page() -> str:
    heads = [head for head, _, _ in COLUMNS] + list(COSTS)
    sizes = sorted(load("unseen_reported.json")["sizes"], key=int)
    parts = [("", _LEAD)]
    for size in sizes:
        found = rows(size)
        ours = next((label for label in found if label.startswith(f"{OURS}, n")), "")
        apart = [label for label in found if label.partition(", n")[0] in APART]
        table = html_table(heads, found, ours, f"{size} LoRAs", apart=apart, low=list(COSTS))
        parts.append((f"{size} LoRAs", table))
    return html_page("Merging LoRAs: standings on new words", parts)


def main() -> None:
    path = BUILD / "standings.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
