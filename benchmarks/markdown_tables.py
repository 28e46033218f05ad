"""What the tables of the pages are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from outputs import RESULTS


def load(name: str) -> dict[str, Any]:
    """A file of ``results/``."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def load_rows(name: str) -> list[dict[str, Any]]:
    """A file of ``results/`` with a row in each line."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def lines(head: Sequence[str], rows: Iterable[Sequence[str]], right: int = 0) -> list[str]:
    """A table, of whose columns the last ``right`` are aligned to the right."""
    rule = "|" + "---|" * (len(head) - right) + "---:|" * right
    return [_line(head), rule, *map(_line, rows)]


def cell(entry: Mapping[str, float | None] | None, digits: int = 3) -> str:
    """A mean with its standard error, where there is one."""
    if entry is None:
        return ""
    shown = f"{entry['mean']:.{digits}f}"
    if entry["se"] is not None:
        shown += f" ± {entry['se']:.{digits}f}"
    return short(shown)


def short(text: str) -> str:
    """Without the zeros before points."""
    return re.sub(r"\b0\.", ".", text)


def signed(value: Mapping[str, Any]) -> str:
    """A difference with its standard error, where it has one."""
    error = value["se"]
    return short(f"{value['mean']:+.3f}" + ("" if error is None else f" ± {error:.3f}"))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
