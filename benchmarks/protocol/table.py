"""The figures of what was measured: means over sets and replicates, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from iteris_core.score.measures import (
    collapse_rate,
    harmonic_score,
    likeness_kept,
    several_in_one,
    share_of_alone,
)

from .plan import BASE, OURS, SINGLE, Unit, uses_data
from .runs import Entry

Figures = dict[str, Any]
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
      2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
      2.052, 2.048, 2.045)  # fmt: skip
"""Student's 97.5 % quantile by degrees of freedom, from one on; 1.96 beyond."""


def stat(values: Sequence[float]) -> Figures:
    """Mean, standard error and the 95 % interval by Student's t over ``n`` sets."""
    n, mean = len(values), fmean(values)
    if n < 2:
        return {"mean": mean, "se": None, "interval": None, "n": n}
    error = stdev(values) / math.sqrt(n)
    wide = error * (_T[n - 2] if n - 2 < len(_T) else 1.96)
    return {"mean": mean, "se": error, "interval": [mean - wide, mean + wide], "n": n}


class Table:
    """Everything that was measured of a plan, by method."""

    def __init__(
        self, units: Iterable[Unit], known: Mapping[str, Entry], collapse_below: Sequence[float]
    ) -> None:
        self._below = collapse_below
        self._alone: dict[tuple[str, int, str], list[Any]] = {}
        """(single or base, replicate, subject) → rows of its pictures"""
        self._merges: dict[tuple[str, int, str], dict[tuple[int, tuple[str, ...]], Entry]] = {}
        """(regime, how many, method) → (replicate, names) → what was measured"""
        self._styled: dict[str, dict[str, dict[tuple[int, tuple[str, ...]], Entry]]] = {}
        for unit in units:
            entry = known.get(unit.key)
            if entry is None:
                continue
            place = (unit.replicate, unit.names)
            regimes = (unit.regime,)
            if not uses_data(unit.method):
                regimes = ("default", "few")  # which do not differ for it
            for regime in regimes:
                if unit.styled:
                    of = self._styled.setdefault(regime, {}).setdefault(unit.method, {})
                    of[place] = entry
                elif unit.method not in (SINGLE, BASE):
                    key = (regime, len(unit.names), unit.method)
                    self._merges.setdefault(key, {})[place] = entry
            if unit.method in (SINGLE, BASE) and not unit.styled:
                self._alone[unit.method, unit.replicate, unit.names[0]] = entry["alone"]

    def figures(self) -> Figures:
        """``regimes``, ``together``, ``leads`` and ``styles``, as the results' files hold them."""
        regimes: Figures = {}
        together: Figures = {}
        leads: Figures = {}
        for regime, size in dict.fromkeys((r, k) for r, k, _ in sorted(self._merges)):
            methods = {m: e for (r, k, m), e in self._merges.items() if (r, k) == (regime, size)}
            rows = {method: self._row(entries) for method, entries in methods.items()}
            every = {place for entries in methods.values() for place in entries}
            for name in (SINGLE, BASE):
                row = self._reference_row(name, sorted(every))
                if row:
                    rows = {name: row, **rows}
            regimes.setdefault(regime, {})[str(size)] = rows
            together.setdefault(regime, {})[str(size)] = {
                method: self._together_row(entries) for method, entries in methods.items()
            }
            lead = _lead(methods, rows)
            if lead:
                leads.setdefault(regime, {})[str(size)] = lead
        styles = {
            regime: {method: self._styled_row(entries) for method, entries in methods.items()}
            for regime, methods in self._styled.items()
        }
        return {"regimes": regimes, "leads": leads, "together": together, "styles": styles}

    def _row(self, entries: Mapping[tuple[int, tuple[str, ...]], Entry]) -> Figures:
        row = self._columns([entry["alone"] for entry in entries.values()])
        shares: list[float] = []
        kept: list[float] = []
        for (replicate, names), entry in entries.items():
            image = _image(entry["alone"])
            single, base = (self._gathered(name, replicate, names) for name in (SINGLE, BASE))
            if single:
                shares.append(share_of_alone(image, _image(single)))
            if single and base and _image(single) > _image(base):
                kept.append(likeness_kept(image, _image(single), _image(base)))
        if shares:
            row["share"] = stat(shares)
        if kept:
            row["kept"] = stat(kept)
        for cost in ("seconds", "rank", "bytes"):
            row[cost] = fmean(entry[cost] for entry in entries.values())
        return row

    def _reference_row(self, name: str, places: Sequence[tuple[int, tuple[str, ...]]]) -> Figures:
        rows = [self._gathered(name, replicate, names) for replicate, names in places]
        rows = [row for row in rows if row]
        return self._columns(rows) if rows else {}

    def _gathered(self, name: str, replicate: int, names: Sequence[str]) -> list[Any]:
        """The pictures of each of ``names`` by its own LoRA or by the base; empty unless all are
        there."""
        rows = [self._alone.get((name, replicate, subject)) for subject in names]
        return [row for some in rows for row in some or ()] if all(rows) else []

    def _columns(self, sets: Sequence[Sequence[Any]]) -> Figures:
        """Of each set's pictures [name, {judge: likeness}, text]."""
        judges = list(sets[0][0][1])
        row: Figures = {
            judge: stat([fmean(picture[1][judge] for picture in some) for some in sets])
            for judge in judges
        }
        row["text"] = stat([fmean(picture[2] for picture in some) for some in sets])
        rates = {
            below: stat([collapse_rate([p[1]["image"] for p in some], below) for some in sets])
            for below in self._below
        }
        row["scr"] = rates[self._below[0]]
        row["scr_at"] = {f"{below:g}": rate["mean"] for below, rate in rates.items()}
        return row

    def _together_row(self, entries: Mapping[tuple[int, tuple[str, ...]], Entry]) -> Figures:
        sets = [entry["together"] for entry in entries.values()]
        judged = [
            [[found and found["image"] for found in picture[1]] for picture in some]
            for some in sets
        ]
        found = [several_in_one(some) for some in judged]
        lost = [
            collapse_rate([value or 0.0 for picture in some for value in picture], self._below[0])
            for some in judged
        ]
        return {
            "image": stat([likeness for likeness, _ in found]),
            "success": stat([success for _, success in found]),
            "scr": stat(lost),
            "text": stat([fmean(picture[2] for picture in some) for some in sets]),
        }

    def _styled_row(self, entries: Mapping[tuple[int, tuple[str, ...]], Entry]) -> Figures:
        """S_harm of all judges' scores of subject and style, and each of them."""
        pairs = [entry["styled"] for entry in entries.values()]
        judges = list(pairs[0][0][1][0])
        row: Figures = {
            "s_harm": stat(
                [
                    fmean(
                        harmonic_score([of[judge] for of in picture[1] for judge in judges])
                        for picture in some
                    )
                    for some in pairs
                ]
            ),
            "text": stat([fmean(picture[2] for picture in some) for some in pairs]),
        }
        for place, what in enumerate(("subject", "style")):
            for judge in judges:
                row[f"{what}, {judge}"] = stat(
                    [fmean(picture[1][place][judge] for picture in some) for some in pairs]
                )
        return row


def _image(rows: Sequence[Any]) -> float:
    return fmean(row[1]["image"] for row in rows)


def _lead(
    methods: Mapping[str, Mapping[tuple[int, tuple[str, ...]], Entry]],
    rows: Mapping[str, Figures],
) -> Figures:
    """How far ours is ahead of the best of the others in likeness, set by set: all methods draw
    the same prompts from the same noise, so that differences vary less than the figures."""
    rivals = [m for m in methods if m != OURS]
    if OURS not in methods or not rivals:
        return {}
    best = max(rivals, key=lambda m: rows[m]["image"]["mean"])
    common = [place for place in methods[OURS] if place in methods[best]]
    if not common:
        return {}
    columns: dict[str, Callable[[Entry], float]] = {
        "image": lambda entry: _image(entry["alone"]),
        "text": lambda entry: fmean(row[2] for row in entry["alone"]),
    }
    return {
        "over": best,
        **{
            column: stat([of(methods[OURS][p]) - of(methods[best][p]) for p in common])
            for column, of in columns.items()
        },
    }
