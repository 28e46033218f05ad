"""The figures of what was measured: means over sets, and paired differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from .plan import BASE, SINGLE, Plan
from .runs import Entry, Runs

Figures = dict[str, Any]
Place = tuple[int, tuple[str, ...]]
"""A replicate and the names of a set."""

Row = dict[str, dict[str, float]]
"""kind of prompt → figure → mean over the pictures of a set"""

KEPT = ("likeness", "judge")
"""Figures that also stand as a share of what each LoRA alone has above the base."""

TOLD_APART = 0.05
"""By how much the LoRAs alone must be above the base for a share of it to mean something."""

LESS = ("pixels",)
"""Figures of which less is better."""


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


def joined(entries: Iterable[Entry], kinds: Sequence[str]) -> Entry:
    """Entries of single concepts as that of a set."""
    every = list(entries)
    return {kind: [row for entry in every for row in entry[kind]] for kind in kinds}


def row(entry: Entry, alone: Entry, base: Entry, kinds: Sequence[str]) -> Row:
    """Means over pictures, what a merge keeps of ``alone`` above ``base`` (``… kept``), and its
    spread as a share of that of each LoRA alone."""
    found: Row = {}
    for kind in kinds:
        found[kind] = means = _means(entry[kind])
        if kind == "spread":
            own = _means(alone[kind])
            found[kind] = {name: value / own[name] for name, value in means.items()}
            continue
        for name in KEPT:
            if kind == "no trigger" or name not in means:
                continue
            low, high = (_means(other[kind])[name] for other in (base, alone))
            if high - low > TOLD_APART:
                means[f"{name} kept"] = (means[name] - low) / (high - low)
    return found


def _means(rows: Sequence[Any]) -> dict[str, float]:
    return {name: fmean(figures[name] for _, figures in rows) for name in rows[0][1]}


def against(ours: Mapping[Place, float], theirs: Mapping[Place, float], *, less: bool) -> Figures:
    """``ours`` less ``theirs`` over the sets that both have, with the interval and its verdict;
    with ``less`` the smaller one is the better."""
    found = stat([ours[place] - theirs[place] for place in ours if place in theirs])
    return found | {"verdict": verdict(found["interval"], less=less)}


def verdict(interval: Sequence[float] | None, *, less: bool = False) -> str:
    """``first`` or ``behind`` where a 95 % interval of differences leaves out 0, else ``level``;
    ``unknown`` without one, of a single set."""
    if interval is None:
        return "unknown"
    low, high = interval
    if low <= 0 <= high:
        return "level"
    return "first" if (low > 0) != less else "behind"


Rows = dict[str, dict[Place, Row]]
"""label → set → figures"""


def rows_of_size(plan: Plan, size: int, alone: Runs, merged: Runs) -> Rows:
    """Of all sets of ``size`` that are measured, the LoRAs alone and the base among them."""
    rows: Rows = {}
    kinds = plan.world.kinds
    for variant, trial in plan.merges():
        if len(trial.names) != size:
            continue
        of = {
            method: [one.key for one in plan.references_of(method, trial.names, trial.replicate)]
            for method in (SINGLE, BASE)
        }
        if not all(key in alone.known for keys in of.values() for key in keys):
            continue
        own, base = (
            joined((alone.known[key] for key in of[method]), kinds) for method in (SINGLE, BASE)
        )
        place = trial.replicate, trial.names
        for method, entry in ((SINGLE, own), (BASE, base)):
            rows.setdefault(method, {})[place] = row(entry, own, base, kinds)
        if trial.key in merged.known:
            entry = merged.known[trial.key]
            rows.setdefault(variant.label, {})[place] = row(entry, own, base, kinds)
    return rows


def figures(rows: Rows, ours: str) -> Figures:
    """``rows``: label → kind → figure → its mean with an interval over sets; ``against``: the same
    of ``ours`` less each other method on the sets of both, with a verdict."""
    means: Figures = {}
    paired: Figures = {}
    mine = rows.get(ours, {})
    for label, of in rows.items():
        for kind, name in _columns(of):
            values = _column(of, kind, name)
            means.setdefault(label, {}).setdefault(kind, {})[name] = stat(list(values.values()))
            both = _column(mine, kind, name)
            if label != ours and kind != "spread" and both.keys() & values.keys():
                difference = against(both, values, less=name in LESS)
                paired.setdefault(label, {}).setdefault(kind, {})[name] = difference
    return {"rows": means, "against": paired}


def _columns(of: Mapping[Place, Row]) -> list[tuple[str, str]]:
    """Kind and figure of all that any set has."""
    return list(dict.fromkeys((k, name) for one in of.values() for k in one for name in one[k]))


def _column(of: Mapping[Place, Row], kind: str, name: str) -> dict[Place, float]:
    return {place: one[kind][name] for place, one in of.items() if name in one.get(kind, {})}
