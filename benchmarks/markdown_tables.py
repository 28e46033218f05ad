"""Building blocks of the pages' tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from outputs import RESULTS, rounded
from protocol.figures import results
from protocol.runs import Entry, stored


def load(name: str) -> dict[str, Any]:
    """Load a file from ``results/``."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def runs(name: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The runs of such a file by their keys' parts."""
    return {tuple(json.loads(key)): of for key, of in load(name)["runs"].items()}


def merges(name: str) -> dict[str, Entry]:
    return stored(RESULTS / f"{name}_runs.jsonl")


@cache
def figures(name: str, further: str = "") -> Mapping[str, Any]:
    """Figures by number of LoRAs of what :mod:`unseen` kept, with runs of ``further`` methods."""
    world = re.sub("_(lead|bound|frozen|steps)$", "", name)
    alone = stored(RESULTS / f"{world}_alone.jsonl")
    runs = {**merges(name), **(merges(further) if further else {})}
    return rounded(results(alone, runs))


def table(
    heads: Sequence[str], rows: Iterable[Sequence[Any]], digits: int = 3, labels: int = 1
) -> list[str]:
    """A table; columns after the first ``labels`` are right-aligned. Cells are text, numbers, means
    with errors in the form of :func:`shown`, or empty."""
    rule = "|" + "---|" * labels + "---:|" * (len(heads) - labels)
    return [_line(heads), rule, *(_line([shown(cell, digits) for cell in row]) for row in rows)]


def shown(cell: Any, digits: int = 3) -> str:
    """A number with that many digits; for a mapping, its ``mean`` with ± its standard error or half
    its 95 % interval."""
    if cell is None or isinstance(cell, str):
        return cell or ""
    if isinstance(cell, Mapping):
        error = half_width(cell) if "interval" in cell else cell["se"]
        mean = shown(float(cell["mean"]), digits)
        return mean if error is None else f"{mean} ± {shown(error, digits)}"
    return short(f"{cell:.{digits}f}") if isinstance(cell, float) else str(cell)


def half_width(figure: Mapping[str, Any]) -> float | None:
    """Half the width of the interval; None for a single set."""
    return figure["interval"][1] - figure["mean"] if figure["interval"] else None


def lead(figure: Mapping[str, Any] | None) -> str:
    """A difference, with its sign."""
    if figure is None:
        return ""
    return ("" if figure["mean"] < 0 else "+") + shown(figure)


def share(figure: Mapping[str, Any]) -> str:
    """A percentage; with fewer than three sets, without the interval, which is meaningless
    there."""
    mean = f"{round(figure['mean'], 2) + 0.0:.0%}"  # no -0%
    return f"{mean} ± {100 * half_width(figure):.0f}" if figure["n"] > 2 else mean


def short(text: str) -> str:
    """Remove zeros before decimal points."""
    return re.sub(r"\b0\.", ".", text)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
