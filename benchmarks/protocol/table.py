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
Place = tuple[int, tuple[str, ...]]
"""A replicate and the names of a set."""
Entries = Mapping[Place, Entry]
Values = dict[str, dict[Place, float]]
"""column → set → value"""
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
        self._merges: dict[tuple[str, int, str], dict[Place, Entry]] = {}
        """(regime, how many, method) → (replicate, names) → what was measured"""
        self._styled: dict[str, dict[str, dict[Place, Entry]]] = {}
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
        """``regimes``, ``together`` and ``styles``, as the results' files hold them."""
        regimes: Figures = {}
        together: Figures = {}
        for regime, size in dict.fromkeys((r, k) for r, k, _ in sorted(self._merges)):
            methods = {m: e for (r, k, m), e in self._merges.items() if (r, k) == (regime, size)}
            rows = self._rows(methods, self._of_each)
            for method, entries in methods.items():
                rows[method]["scr_at"] = self._collapsed(entries)
                for cost in ("seconds", "rank", "bytes"):
                    rows[method][cost] = fmean(entry[cost] for entry in entries.values())
            every = sorted({place for entries in methods.values() for place in entries})
            regimes.setdefault(regime, {})[str(size)] = {**self._references(every), **rows}
            together.setdefault(regime, {})[str(size)] = self._rows(methods, self._of_several)
        styles = {
            regime: self._rows(methods, self._of_styled) for regime, methods in self._styled.items()
        }
        return {"regimes": regimes, "together": together, "styles": styles}

    def _rows(self, methods: Mapping[str, Entries], of: Callable[[Entries], Values]) -> Figures:
        """method → column → figures; ``behind`` is how far a method is behind ours, set by set:
        all draw the same prompts from the same noise, so that differences vary less."""
        values = {method: of(entries) for method, entries in methods.items()}
        rows: Figures = {
            method: {column: stat(list(some.values())) for column, some in columns.items()}
            for method, columns in values.items()
        }
        ours = values.pop(OURS, {})
        for method, theirs in values.items() if ours else ():
            rows[method]["behind"] = _differences(ours, theirs)
        return rows

    def _references(self, places: Sequence[Place]) -> Figures:
        """Each LoRA alone and the base, on the sets of the merges."""
        found: Figures = {}
        for name in (SINGLE, BASE):
            rows = {
                place: {"alone": gathered}
                for place in places
                if (gathered := self._gathered(name, *place))
            }
            if rows:
                columns = self._of_pictures(rows)
                found[name] = {
                    **{column: stat(list(some.values())) for column, some in columns.items()},
                    "scr_at": self._collapsed(rows),
                }
        return found

    def _gathered(self, name: str, replicate: int, names: Sequence[str]) -> list[Any]:
        """The pictures of each of ``names`` by its own LoRA or by the base; empty unless all are
        there."""
        rows = [self._alone.get((name, replicate, subject)) for subject in names]
        return [row for some in rows for row in some or ()] if all(rows) else []

    def _of_each(self, entries: Entries) -> Values:
        """Of pictures of one concept each."""
        shares: dict[Place, float] = {}
        kept: dict[Place, float] = {}
        for place, entry in entries.items():
            image = _image(entry["alone"])
            single, base = (self._gathered(name, *place) for name in (SINGLE, BASE))
            if single:
                shares[place] = share_of_alone(image, _image(single))
            if single and base and _image(single) > _image(base):
                kept[place] = likeness_kept(image, _image(single), _image(base))
        found = {**self._of_pictures(entries), "share": shares, "kept": kept}
        return {column: some for column, some in found.items() if some}

    def _of_pictures(self, entries: Entries) -> Values:
        """Of each set's pictures [name, {judge: likeness}, text]."""
        sets = {place: entry["alone"] for place, entry in entries.items()}
        judges = list(next(iter(sets.values()))[0][1])
        return {
            **{
                judge: {place: fmean(p[1][judge] for p in some) for place, some in sets.items()}
                for judge in judges
            },
            "text": {place: fmean(p[2] for p in some) for place, some in sets.items()},
            "scr": {place: self._rate(some, self._below[0]) for place, some in sets.items()},
        }

    def _collapsed(self, entries: Entries) -> dict[str, float]:
        return {
            f"{below:g}": fmean(self._rate(entry["alone"], below) for entry in entries.values())
            for below in self._below
        }

    @staticmethod
    def _rate(pictures: Sequence[Any], below: float) -> float:
        return collapse_rate([picture[1]["image"] for picture in pictures], below)

    def _of_several(self, entries: Entries) -> Values:
        """Of pictures of several concepts; one that is not found counts nothing."""
        found: Values = {"image": {}, "success": {}, "scr": {}, "text": {}}
        for place, entry in entries.items():
            some = entry["together"]
            judged = [[seen and seen["image"] for seen in picture[1]] for picture in some]
            found["image"][place], found["success"][place] = several_in_one(judged)
            found["scr"][place] = collapse_rate(
                [value or 0.0 for picture in judged for value in picture], self._below[0]
            )
            found["text"][place] = fmean(picture[2] for picture in some)
        return found

    def _of_styled(self, entries: Entries) -> Values:
        """S_harm of all judges' scores of subject and style, and each of them."""
        pairs = {place: entry["styled"] for place, entry in entries.items()}
        judges = list(next(iter(pairs.values()))[0][1][0])

        def scored(of: Callable[[Any], float]) -> dict[Place, float]:
            return {place: fmean(of(picture) for picture in some) for place, some in pairs.items()}

        found: Values = {
            "s_harm": scored(
                lambda picture: harmonic_score([of[j] for of in picture[1] for j in judges])
            ),
            "text": scored(lambda picture: picture[2]),
        }
        for number, what in enumerate(("subject", "style")):
            for judge in judges:
                found[f"{what}, {judge}"] = scored(
                    lambda picture, number=number, judge=judge: picture[1][number][judge]
                )
        return found


def _image(rows: Sequence[Any]) -> float:
    return fmean(row[1]["image"] for row in rows)


def _differences(ours: Values, theirs: Values) -> Figures:
    found: Figures = {}
    for column in ours:
        common = [p for p in ours[column] if p in theirs.get(column, {})]
        if common:
            found[column] = stat([ours[column][p] - theirs[column][p] for p in common])
    return found
