"""The figures of what was measured: means over sets, and paired differences with intervals.

Sets that share concepts, or LoRAs of one training, are not independent. An interval is clustered by
concept and by training at once: V = V_concepts + V_trainings − V_both (Cameron, Gelbach and Miller,
2011), with the quantile of Student's t for the fewer of the two.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from scipy.stats import t as student

from .plan import BASE, SINGLE, Unit
from .runs import Entry

Figures = dict[str, Any]


class Place(NamedTuple):
    """A set in a training of its LoRAs, once for each replicate."""

    training: int
    names: tuple[str, ...]
    replicate: int = 0


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

LESS = ("pixels", "distance", "base")
"""Figures of which less is better."""

WIDEST = 0.1
"""The widest interval of a verdict of *level*."""

ONE_TRAINING = "unknown: one training"


def stat(cells: Cells) -> Figures:
    """Mean over sets, the least set, and the 95 % interval: ``error`` is its standard error, ``n``
    the fewer of ``concepts`` and ``trainings``. Of one training, or of pictures without a concept,
    it is clustered by the other alone."""
    count = len(cells)
    sets = [fmean(of.values()) for of in cells.values()]
    mean = fmean(sets)
    off = [
        (name, place.training, (value - mean) / (count * len(of)))
        for place, of in cells.items()
        for name, value in of.items()
    ]
    units = concepts, trainings = [{place[i] for place in off} - {""} for i in (0, 1)]
    ways = [1] if not concepts else [0] if len(trainings) == 1 else [0, 1]
    n = min(len(units[way]) for way in ways)
    each = [_clustered([of[way] for of in off], off) for way in ways]
    variance = sum(each)
    if len(each) == 2:
        both = variance - _clustered([of[:2] for of in off], off)
        variance = both if both > 0 else max(each)
    wide = float(student.ppf(0.975, n - 1)) * math.sqrt(variance) if n > 1 else math.inf
    return {
        "mean": mean, "interval": [mean - wide, mean + wide] if n > 1 else None,
        "error": math.sqrt(variance) if n > 1 else None, "n": n,
        "concepts": len(concepts), "trainings": len(trainings),
        "sets": count, "least": min(sets),
    }  # fmt: skip


def _clustered(of: Sequence[Any], off: Sequence[tuple[str, int, float]]) -> float:
    """The variance of a mean whose weighted deviations are summed by cluster."""
    sums: dict[Any, float] = defaultdict(float)
    for cluster, (_, _, value) in zip(of, off, strict=True):
        sums[cluster] += value
    n = len(sums)
    return n / (n - 1) * sum(value**2 for value in sums.values()) if n > 1 else 0.0


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


def separated(found: Sequence[Figures]) -> list[bool]:
    """Whether each of the differences of one table leaves out 0 at 5 % by Holm's correction."""
    chances = [
        2 * float(student.sf(abs(of["mean"]) / of["error"], of["n"] - 1))
        if of["error"] and (of["trainings"] > 1 or not of["concepts"])
        else 1.0
        for of in found
    ]
    tested = sum(chance < 1 for chance in chances)
    apart = [False] * len(found)
    for rank, i in enumerate(sorted(range(len(found)), key=chances.__getitem__)):
        if rank >= tested or chances[i] > 0.05 / (tested - rank):
            break
        apart[i] = True
    return apart


def verdict(found: Figures, *, less: bool = False) -> str:
    """``first`` or ``behind`` where the 95 % interval of differences leaves out 0, ``level`` where
    it holds 0 and is no wider than :data:`WIDEST`, else ``unknown``; of one training
    :data:`ONE_TRAINING`."""
    if found["concepts"] and found["trainings"] < 2:
        return ONE_TRAINING
    if found["interval"] is None:
        return "unknown"
    low, high = found["interval"]
    if low <= 0 <= high:
        return "level" if high - low <= WIDEST else "unknown"
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
        of_size = rows.setdefault(len(unit.names), {})
        place = Place(unit.trained, unit.names, unit.replicate)
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
