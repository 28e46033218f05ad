"""Output paths of the benchmarks: ``results/`` for files that pages quote, ``build/`` for the rest.

A run reduced by ``QUICK=1`` or an option must not overwrite quoted figures, so it is written
elsewhere. Every script here gets its output file from :func:`result_file`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUILD = ROOT / "build"
QUICK = os.environ.get("QUICK") == "1"


def result_file(name: str, *, whole: bool = True) -> Path:
    """``results/NAME``, or ``build/quick/NAME`` for a run that is not ``whole``."""
    return RESULTS / name if whole and not QUICK else BUILD / "quick" / name


def read(path: Path) -> dict[str, Any]:
    """The file's content; empty if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(path: Path, data: Any) -> None:
    """Write as JSON, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def add(path: Path, name: str, found: Any) -> None:
    """Add ``found`` to the file, keeping entries with other names."""
    write(path, {**read(path), name: found})


def asked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Its arguments, with ``until``, what :func:`time.monotonic` is after ``--seconds``."""
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after")
    given = parser.parse_args()
    given.until = time.monotonic() + given.seconds
    return given


def once(path: Path, key: str, until: float, measure: Callable[[], Any]) -> None:
    """Keep what ``measure`` finds among the runs of a JSON file, unless it is there. Once
    :func:`time.monotonic` is ``until``, end the program instead."""
    if key in read(path).get("runs", {}):
        return
    if time.monotonic() > until:
        raise SystemExit("stopped by --seconds; the next run goes on")
    found = rounded(measure())
    write(path, {**read(path), "runs": {**read(path).get("runs", {}), key: found}})
    print(key, found, flush=True)


def rounded(found: Any) -> Any:
    """All numbers rounded to four decimals, except those that would become zero."""
    if isinstance(found, Mapping):
        return {name: rounded(of) for name, of in found.items()}
    if isinstance(found, list | tuple):
        return [rounded(of) for of in found]
    return round(found, 4) or found if isinstance(found, float) else found
