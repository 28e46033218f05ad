"""A sortable page of what :mod:`unseen` measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from protocol.plan import BASE, SINGLE, Unit

from toybox.page import html_page, html_table

NAMES = {SINGLE: "each LoRA alone", BASE: "no LoRA", "sum": "all loaded at once"}
COLUMNS: Sequence[tuple[str, str, str]] = (
    ("likeness kept", "new words", "likeness kept"),
    ("likeness", "new words", "likeness"),
    ("likeness by DINO", "new words", "dino"),
    ("text", "new words", "text"),
    ("attributes", "new words", "judge"),
    ("backgrounds", "new words", "scene"),
    ("base kept without a trigger", "no trigger", "likeness"),
    ("spread of pictures", "spread", "share of pixels"),
    ("kernel distance to each LoRA's own", "quality", "distance"),
    ("kernel distance to the base, no trigger", "quality", "base"),
)
COSTS = {"seconds": ("seconds", 1), "rank": ("rank", 1), "MiB": ("bytes", 2**20)}
"""Heading → what a run has of it, and its unit"""
_LEAD = """<p>LoRAs of {}, drawn on prompts whose words no calibration prompt had. Means over n sets
of LoRAs; ± half of a 95 % interval, clustered by concept and training. A click on a
heading sorts.</p>"""


def page(world: str, data: Mapping[str, Any], runs: Mapping[str, Any]) -> str:
    """Of figures and costs, the most likeness first."""
    parts = [("", _LEAD.format(world))]
    for size, of in data["sizes"].items():
        heads, rows = [*(head for head, _, _ in COLUMNS), *COSTS], dict[str, list[Any]]()
        for label, kinds in sorted(of["rows"].items(), key=_likeness):
            units = [run for key, run in runs.items() if _is_of(Unit.of(key), label, size)]
            rows[_name(label, kinds)] = [
                *(_cell(kinds.get(kind, {}).get(figure)) for _, kind, figure in COLUMNS),
                *(
                    fmean(u[c] for u in units) / unit if units else None
                    for c, unit in COSTS.values()
                ),
            ]
        used = [i for i in range(len(heads)) if any(row[i] is not None for row in rows.values())]
        cells = {label: [row[i] for i in used] for label, row in rows.items()}
        apart = [_name(name, of["rows"][name]) for name in (SINGLE, BASE) if name in of["rows"]]
        ours = _name(data["default"], of["rows"][data["default"]])
        names = [heads[i] for i in used]
        table = html_table(names, cells, ours, f"{size} LoRAs", apart=apart, low=list(COSTS))
        parts.append((f"{size} LoRAs", table))
    return html_page("Merging LoRAs: standings on new words", parts)


def _is_of(unit: Unit, label: str, size: str) -> bool:
    return unit.label == label and str(len(unit.names)) == size


def _likeness(row: tuple[str, Any]) -> float:
    return -row[1].get("new words", {}).get("likeness", {"mean": 0.0})["mean"]


def _name(label: str, kinds: Mapping[str, Any]) -> str:
    sets = max(figure["sets"] for of in kinds.values() for figure in of.values())
    return f"{NAMES.get(label, label)}, n = {sets}"


def _cell(figure: Mapping[str, Any] | None) -> SimpleNamespace | None:
    if figure is None:
        return None
    ends = figure["interval"]
    error = ends[1] - figure["mean"] if ends else math.nan
    return SimpleNamespace(mean=figure["mean"], se=error)
