"""What ``docs/results.md`` tells of: worlds, each with its figures by the number of concepts.

A world is a file of ``results/`` in one of two shapes: ``quality.json``'s, and that of further
worlds, ``{"regimes": {"default": {"3": {"single": …, method: {"image": {"mean", "se"}, …}}}}}``,
with ``together`` alike, of several concepts in one picture, and ``styles`` without the number of
concepts. A file that is not there is a world that is not told of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from markdown_tables import load
from outputs import RESULTS

Row = Mapping[str, Any]
Groups = Mapping[str, Mapping[str, Row]]
"""Concepts → method → column → mean, standard error and, where it is known, interval"""

COLUMNS = {
    "mean": "mean of image and text",
    "image": "image alignment",
    "text": "text alignment",
    "judge": "attributes right (judge)",
    "pair": "two concepts in one picture (judge)",
    "kept": "likeness kept",
    "share": "share of each LoRA alone",
    "success": "pictures in which all are found",
    "s_harm": "S_harm of subject and style",
    "scr": "share of concepts that collapsed (SCR)",
}
LOW = ("scr",)
"""Columns of which less is better."""
PEERS = ("chain-of-merges", "regmean++", "regmean", "ssr", "average", "sum")
"""What is drawn beside ours, and whatever else is ahead of these."""
NOT_RIVALS = ("single", "base")
OURS = "iteris"


@dataclass(frozen=True)
class Against:
    """Ours and the best of the others: ``ahead`` is by how much ours is better, ``error`` its
    standard error, set by set; where only means are known that of two which share nothing, which is
    too large: methods draw from the same noise. ``ours`` is of the sets that both have."""

    count: str
    column: str
    method: str
    theirs: float
    ours: float
    ahead: float
    error: float


@dataclass(frozen=True)
class World:
    key: str
    title: str
    about: str
    groups: Groups

    @property
    def columns(self) -> list[str]:
        rows = [row for methods in self.groups.values() for row in methods.values()]
        return [column for column in COLUMNS if any(column in row for row in rows)]

    def compared(self) -> Iterator[Against]:
        """Ours and the best of the others, count by count and column by column."""
        for count, methods in self.groups.items():
            for column in self.columns:
                rivals = [
                    self._against(count, column, name)
                    for name, row in methods.items()
                    if column in row and name not in NOT_RIVALS and not name.startswith(OURS)
                ]
                if rivals and column in methods[OURS]:
                    yield min(rivals, key=lambda against: against.ahead)

    def _against(self, count: str, column: str, name: str) -> Against:
        """On the sets that both have, where they are told."""
        ours, theirs = (self.groups[count][method][column] for method in (OURS, name))
        paired = self.groups[count][name].get("behind", {}).get(column)
        mean, error = ours["mean"], math.hypot(ours["se"] or 0.0, theirs["se"] or 0.0)
        if paired is not None:
            mean, error = theirs["mean"] + paired["mean"], paired["se"] or 0.0
        ahead = (mean - theirs["mean"]) * (-1 if column in LOW else 1)
        return Against(count, column, name, theirs["mean"], mean, ahead, error)

    def shown(self) -> list[str]:
        """Methods of the plots, ours first."""
        found = {name for methods in self.groups.values() for name in methods}
        return [name for name in (OURS, *PEERS) if name in found]


_TOYBOX = (
    "Ten concepts of [the toybox](../toybox/README.md), a model of 64 x 64 pixels: seven pairs, "
    "five triples and one set each of five, seven and ten. Settings were chosen on other sets of "
    "the same concepts, a few of them on reported ones ([decisions](decisions.md))."
)
_FURTHER = {
    "reported": (
        "Ten further concepts",
        "Ten more concepts of the toybox, drawn by a rule before any was trained; all defaults and "
        "all rivals' settings were chosen on the ten above.",
    ),
    "emoji": (
        "Emoji",
        "A second world, whose pictures artists drew.",
    ),
}
_REGIMES = {"default": "", "few": ", one prompt"}
"""One prompt at one timestep a LoRA, as SSR-Merge."""


def _with_kept(groups: Groups) -> Groups:
    """With image alignment above the base's, as a share of what each LoRA alone has."""
    found: dict[str, dict[str, Row]] = {}
    for count, rows in groups.items():
        floor, alone = (rows[name]["image"]["mean"] for name in ("base", "single"))
        found[count] = {
            name: {
                **row,
                "kept": {"mean": (row["image"]["mean"] - floor) / (alone - floor), "se": None},
            }
            for name, row in rows.items()
        }
    return found


def worlds() -> list[World]:
    found: list[World] = []
    if (RESULTS / "quality.json").is_file():
        found.append(
            World("toybox", "The toybox", _TOYBOX, _with_kept(load("quality.json")["sets"]))
        )
    for key, (title, about) in _FURTHER.items():
        if not (RESULTS / f"{key}.json").is_file():
            continue
        data = load(f"{key}.json")
        for regime in data["regimes"]:
            said = _REGIMES.get(regime, f", {regime}")
            parts = {
                "": ("", data["regimes"][regime]),
                "-together": (", several in one picture", data.get("together", {}).get(regime)),
                "-styles": (
                    ", a subject and a style",
                    {"a subject and a style": data.get("styles", {}).get(regime) or {}},
                ),
            }
            for suffix, (more, groups) in parts.items():
                measured = {c: rows for c, rows in (groups or {}).items() if OURS in rows}
                if measured:
                    named = f"{key}-{regime}{suffix}"
                    found.append(World(named, title + more + said, about, measured))
    return found
