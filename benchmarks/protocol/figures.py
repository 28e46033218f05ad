"""The figures of what was measured: means over sets, and paired differences with intervals.

Sets that share concepts, or LoRAs of one training, are not independent. An interval is therefore
over concepts or over trainings, whichever is wider.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from .plan import BASE, SINGLE, Unit
from .runs import Entry

Figures = dict[str, Any]
Place = tuple[int, tuple[str, ...]]
"""A replicate, of a training of its own where there are several, and the names of a set."""

ByConcept = dict[str, float]
Row = dict[str, dict[str, ByConcept]]
"""kind of prompt → figure → concept → mean over its pictures; of pictures without one, ``""``"""
Cells = Mapping[Place, ByConcept]
"""One figure of one method in all sets."""

KEPT = ("likeness", "judge")
"""Figures that also stand as a share of what each LoRA alone has above the base."""

TOLD_APART = 0.05
"""By how much the LoRAs alone must be above the base for a share of it to mean something."""

COLLAPSED = 0.5
"""A concept that keeps less than this share has collapsed."""

LESS = ("pixels",)
"""Figures of which less is better."""

FEWEST, WIDEST = 5, 0.1
"""Units of an interval, and its width, that a verdict of *level* needs."""

_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
      2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
      2.052, 2.048, 2.045)  # fmt: skip
"""Student's 97.5 % quantile by degrees of freedom, from one on; 1.96 beyond."""


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval by Student's t; infinite for a single value."""
    n = len(values)
    if n < 2:
        return math.inf
    return stdev(values) / math.sqrt(n) * (_T[n - 2] if n - 2 < len(_T) else 1.96)


def stat(cells: Cells) -> Figures:
    """Mean over sets, the median and the least set, and the 95 % interval over the ``n`` units
    ("concepts" or "trainings") that make it wider."""
    sets = [fmean(of.values()) for of in cells.values()]
    wide, units, n = max(
        (half_width(values), name, len(values)) for name, values in units_of(cells).items()
    )
    mean = fmean(sets)
    interval = [mean - wide, mean + wide] if math.isfinite(wide) else None
    return {
        "mean": mean, "interval": interval, "n": n, "units": units,
        "sets": len(sets), "median": median(sets), "least": min(sets),
    }  # fmt: skip


def units_of(cells: Cells) -> dict[str, list[float]]:
    """The means by concept, and by training where there are three or more."""
    by_concept: dict[str, list[float]] = defaultdict(list)
    by_training: dict[int, list[float]] = defaultdict(list)
    for (training, _), of in cells.items():
        by_training[training].append(fmean(of.values()))
        for name, value in of.items():
            by_concept[name].append(value)
    units = {"concepts": by_concept} if "" not in by_concept else {}
    if len(by_training) > 2 or not units:
        units["trainings"] = by_training
    return {name: [fmean(some) for some in of.values()] for name, of in units.items()}


def row(entry: Entry, alone: Entry, base: Entry, kinds: Sequence[str]) -> Row:
    """Means over pictures, what a merge keeps of ``alone`` above ``base`` (``… kept``), and its
    spread as a share of that of each LoRA alone."""
    found: Row = {}
    for kind in kinds:
        found[kind] = means = _means(entry[kind])
        if kind == "spread":
            own = _means(alone[kind])
            for name, of in means.items():
                means[name] = {one: value / own[name][one] for one, value in of.items()}
            continue
        for name in KEPT:
            if kind == "no trigger" or name not in means:
                continue
            low, high = (_means(other[kind])[name] for other in (base, alone))
            above = {one: high[one] - low[one] for one in means[name]}
            if fmean(above.values()) > TOLD_APART:
                # By concept a share of the mean, so that the mean of shares is the share of means.
                whole = fmean(above.values())
                means[f"{name} kept"] = {
                    one: 1 + (value - high[one]) / whole for one, value in means[name].items()
                }
    return found


def _means(rows: Sequence[Any]) -> dict[str, ByConcept]:
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for concept, figures in rows:
        for name, value in figures.items():
            found[name][concept].append(value)
    return {name: {one: fmean(some) for one, some in of.items()} for name, of in found.items()}


def collapsed(ours: Cells, alone: Cells, base: Cells) -> float | None:
    """The share of concepts, over sets, that keep less than :data:`COLLAPSED` of what their LoRA
    adds to the base, among those to which it adds something."""
    shares = [
        (of[one] - base[place][one]) / above
        for place, of in ours.items()
        for one in of
        if (above := alone[place][one] - base[place][one]) > TOLD_APART
    ]
    return fmean(share < COLLAPSED for share in shares) if shares else None


def against(ours: Cells, theirs: Cells, *, less: bool) -> Figures:
    """``ours`` less ``theirs`` over the sets that both have, with the interval and its verdict;
    with ``less`` the smaller one is the better."""
    found = stat(
        {
            place: {name: value - theirs[place][name] for name, value in of.items()}
            for place, of in ours.items()
            if place in theirs
        }
    )
    return found | {"verdict": verdict(found, less=less)}


def verdict(found: Figures, *, less: bool = False) -> str:
    """``first`` or ``behind`` where the 95 % interval of differences leaves out 0, ``level`` where
    it holds 0, is of at least :data:`FEWEST` units and no wider than :data:`WIDEST`, else
    ``unknown``."""
    if found["interval"] is None:
        return "unknown"
    low, high = found["interval"]
    if low <= 0 <= high:
        return "level" if found["n"] >= FEWEST and high - low <= WIDEST else "unknown"
    return "first" if (low > 0) != less else "behind"


Rows = dict[str, dict[Place, Row]]
"""label → set → figures"""


def rows_by_size(alone: Mapping[str, Entry], merged: Mapping[str, Entry]) -> dict[int, Rows]:
    """Of all sets of ``merged`` whose LoRAs are measured ``alone``, these and the base among them;
    without any the merges alone."""
    references: dict[tuple[str, tuple[str, ...], int], Entry] = {}
    for unit, entry in _units(alone):
        references[unit.method, unit.names, unit.replicate] = entry

    def reference(method: str, unit: Unit, kinds: Sequence[str]) -> Entry | None:
        """That of a set, which mostly is of each of its concepts."""
        whole = references.get((method, unit.names, unit.replicate))
        each = [references.get((method, (name,), unit.replicate)) for name in unit.names]
        every = [of for of in ([whole] if whole else each) if of]
        if not whole and len(every) < len(each):
            return None
        return {kind: [row for of in every for row in of[kind]] for kind in kinds}

    rows: dict[int, Rows] = {}
    for unit, entry in _units(merged):
        kinds = [kind for kind, of in entry.items() if isinstance(of, list)]
        of_size, place = rows.setdefault(len(unit.names), {}), (unit.replicate, unit.names)
        own, base = (reference(method, unit, kinds) for method in (SINGLE, BASE))
        if own and base:
            for label, of in ((SINGLE, own), (BASE, base), (unit.label, entry)):
                of_size.setdefault(label, {})[place] = row(of, own, base, kinds)
        elif not alone:
            of_size.setdefault(unit.label, {})[place] = row(entry, entry, entry, kinds)
    return rows


def _units(entries: Mapping[str, Entry]) -> list[tuple[Unit, Entry]]:
    return [(Unit.of(key), entry) for key, entry in entries.items()]


def figures(rows: Rows, ours: str) -> Figures:
    """``rows``: label → kind → figure → :func:`stat`, of kept ones with the share of ``collapsed``
    concepts; ``against``: the same of ``ours`` less each other method on the sets of both, with a
    verdict."""
    means: Figures = {}
    paired: Figures = {}
    mine = rows.get(ours, {})
    for label, of in rows.items():
        for kind, name in _columns(of):
            values = _column(of, kind, name)
            cell = means.setdefault(label, {}).setdefault(kind, {})[name] = stat(values)
            if name.endswith(" kept") and SINGLE in rows and BASE in rows:
                plain = name.removesuffix(" kept")
                three = (_column(some, kind, plain) for some in (of, rows[SINGLE], rows[BASE]))
                cell["collapsed"] = collapsed(*three)
            both = _column(mine, kind, name)
            if label != ours and kind != "spread" and both.keys() & values.keys():
                difference = against(both, values, less=name in LESS)
                paired.setdefault(label, {}).setdefault(kind, {})[name] = difference
    return {"rows": means, "against": paired}


def _columns(of: Mapping[Place, Row]) -> list[tuple[str, str]]:
    """Kind and figure of all that any set has."""
    return list(dict.fromkeys((k, name) for one in of.values() for k in one for name in one[k]))


def _column(of: Mapping[Place, Row], kind: str, name: str) -> dict[Place, ByConcept]:
    return {place: one[kind][name] for place, one in of.items() if name in one.get(kind, {})}


def results(
    alone: Mapping[str, Entry], merged: Mapping[str, Entry], ours: str = "iteris"
) -> Figures:
    """:func:`figures` of each number of LoRAs, and ``default``, the method held against others."""
    sizes: Figures = {}
    for size, of in sorted(rows_by_size(alone, merged).items()):
        first = [label for label in (SINGLE, BASE, ours) if label in of]
        sizes[str(size)] = figures(
            {label: of[label] for label in dict.fromkeys([*first, *of])}, ours
        )
    return {"default": ours, "sizes": sizes}
