"""Where the benchmarks write: ``results/`` holds what the pages quote, ``build/`` all the rest.

What ``QUICK=1`` or an option makes smaller is not what a page quotes, so it is written beside and
never over it. Every script here gets the file that it writes from :func:`result_file`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUILD = ROOT / "build"
QUICK = os.environ.get("QUICK") == "1"


def result_file(name: str, *, whole: bool = True) -> Path:
    """``results/NAME``, or ``build/quick/NAME`` of a run that is not the ``whole`` one."""
    return RESULTS / name if whole and not QUICK else BUILD / "quick" / name


def read(path: Path) -> dict[str, Any]:
    """What stands there; nothing where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(path: Path, data: Any) -> None:
    """As JSON, and whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def add(path: Path, name: str, found: Any) -> None:
    """``found`` beside what stands there under other names."""
    write(path, {**read(path), name: found})


def rounded(found: Any) -> Any:
    """All numbers to four digits behind the point, but those of which nothing would be left."""
    if isinstance(found, Mapping):
        return {name: rounded(of) for name, of in found.items()}
    if isinstance(found, list | tuple):
        return [rounded(of) for of in found]
    return round(found, 4) or found if isinstance(found, float) else found
