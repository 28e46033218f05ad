"""The rivals' settings for each number of LoRAs, on concepts that no table reports.

``python benchmarks/search_settings.py`` measures grids on the toybox's own concepts and writes the
best settings, by the mean of likeness and text alignment on new words, into
``benchmarks/results/reported_settings.json`` as they are found. What is measured is kept in
``build/``, so that a search that was stopped goes on. Settings that are in this file already were
found on calibration prompts, at commit 394a4c3.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import rivals  # noqa: F401 (registers them)
from outputs import BUILD, read, result_file, write
from protocol.plan import Unit, sets_of
from protocol.runs import Runs
from worlds import toybox

from iteris_core import SettingsError
from iteris_core.methods import find_method
from iteris_core.settings import declared_settings

FILE = result_file("reported_settings.json")
_SCALE = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.3)
_SHARE = (0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
_SHRINK = (0.6, 0.7, 0.8, 0.9, 1.0)
_WINDOW = (0.06, 0.14, 0.22)

GRIDS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "task-arithmetic": {"scale": _SCALE},
    "ties": {"density": _SHARE, "scale": _SCALE},
    "dare-linear": {"density": _SHARE, "scale": _SCALE},
    "dare-ties": {"density": _SHARE, "scale": _SCALE},
    "della": {"density": _SHARE, "window": _WINDOW, "scale": _SCALE},
    "della-linear": {"density": _SHARE, "window": _WINDOW, "scale": _SCALE},
    "knots": {"density": _SHARE, "scale": _SCALE},
    "orthogonal": {"softness": (0.0, 0.5, 1.0, 2.0), "scale": _SCALE},
    "wudi": {"solution": ("adam", "closed"), "rate": (1e-5, 1e-4, 1e-3), "scale": _SCALE},
    "ace": {"uneven": (0.3, 3.0, 30.0), "ridge": (1e-3, 1e-2, 1e-1), "scale": _SCALE},
    "tsv-m": {"scale": _SCALE},
    "iso-c": {"scale": _SCALE},
    "core-space": {"density": _SHARE, "isotropic": (False, True), "scale": _SCALE},
    "compress-then-merge": {"density": _SHARE, "own_norm": (0.0, 0.25, 0.5), "scale": _SCALE},
    "pico": {"merge": ("mean", "tsv-m"), "scale": _SCALE},
    "regmean": {"shrink": _SHRINK},
    "regmean++": {"shrink": _SHRINK},
    "chain-of-merges": {"shrink": _SHRINK, "ridge": (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)},
    "gradient-fusion": {"steps": (25, 50, 100, 200), "text_steps": (125, 250, 500)},
    "loraclr": {"rate": (1e-4, 3e-4, 9e-4), "steps": (50, 100, 200), "margin": (0.5, 5.0, 50.0)},
    "ssr": {"ridge": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)},
    "custom-diffusion": {"ridge": (1e-9, 1e-8, 1e-7, 1e-6, 1e-5)},
    "iteris-subspace": {"ridge": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)},
}
"""Around what the authors of each method give."""

SUBJECTS = 6
"""How many of them a setting is judged by: three pairs, two triples, one set of more."""


def searched(method: str, size: int, file: Path = FILE) -> Mapping[str, Any]:
    """What was found; with more LoRAs than any search had, what it found with the most."""
    found = read(file).get(method, {}).get("default", {})
    most = max(map(int, found), default=size)
    return found.get(str(min(size, most)), {})


def tuned(method: str, score: Callable[[Mapping[str, Any]], float]) -> dict[str, Any]:
    """The settings with the best ``score``: better than with any one of them moved to another value
    of its grid."""
    grid, kind = GRIDS[method], find_method(method).settings
    known: dict[str, float] = {}

    def quality(settings: Mapping[str, Any]) -> float:
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            try:
                kind.from_mapping(settings)
            except SettingsError:
                return float("-inf")
            known[key] = score(settings)
            print(f"{method} {key}: {known[key]:.4f}", file=sys.stderr, flush=True)
        return known[key]

    defaults = {name: declared_settings(kind)[name].default for name in grid}
    best = {
        name: defaults[name] if defaults[name] in values else values[len(values) // 2]
        for name, values in grid.items()
    }
    while True:
        before = best
        for name, values in grid.items():
            best = max([best, *({**best, name: value} for value in values)], key=quality)
        if best == before:
            return best


class OutOfTime(Exception):
    """The time for a search is over."""


def search(
    runs: Runs, file: Path, methods: Iterable[str] = GRIDS, seconds: float = float("inf")
) -> bool:
    """Find what ``file`` does not have; whether it has all now."""
    until, subjects = time.monotonic() + seconds, runs.world.subjects

    def score(method: str, size: int, settings: Mapping[str, Any]) -> float:
        sets = sets_of(subjects, size, 0)[: max(1, SUBJECTS // size)]
        units = [Unit(method, names, settings=settings) for names in sets]
        if not runs.run(units, until - time.monotonic()):
            raise OutOfTime
        pictures = [row for unit in units for row in runs.known[unit.key]["new words"]]
        return fmean((found["likeness"] + found["text"]) / 2 for _, found in pictures)

    for size in (size for size in runs.world.sizes if size <= len(subjects)):
        for method in methods:
            found = read(file)
            of_method = found.setdefault(method, {}).setdefault("default", {})
            if str(size) in of_method:
                continue
            try:
                best = tuned(method, lambda some, m=method, s=size: score(m, s, some))
            except OutOfTime:
                return False
            of_method[str(size)] = best
            write(file, found)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after")
    parser.add_argument("--methods", nargs="*", default=list(GRIDS), choices=GRIDS)
    asked = parser.parse_args()
    runs = Runs(toybox(), BUILD / "reported_tuning.jsonl")
    whole = search(runs, FILE, asked.methods, asked.seconds)
    print("all settings are known" if whole else "stopped by --seconds")


if __name__ == "__main__":
    main()
