"""The open benchmark: somebody's method on new words, among those that were measured already.

``python benchmarks/open_bench.py FOLDER`` calls ``merge`` of ``FOLDER/method.py`` with the values
of ``FOLDER/settings.json`` (``benchmarks/open/README.md``). It writes
``benchmarks/results/open/NAME.json`` and the page ``build/standings.html``; on a world of a YAML
file, ``build/quick/open/NAME.json`` and ``build/standings_WORLD.html``. What is measured is kept in
``build/open``, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import runpy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rivals  # noqa: F401 (registers them)
import standings
from outputs import BUILD, RESULTS, result_file, rounded, write
from protocol.figures import figures, rows_of_size
from protocol.plan import Plan, Unit, Variant
from protocol.runs import Runs
from protocol.world import World
from worlds import HELP, WORLDS, sizes_in, world_of

from iteris_core import Concept, Lora

SIZES, SETS = (2, 5, 10), 2
Merge = Callable[..., Lora]


def loaded(folder: Path) -> tuple[Merge, dict[str, Any]]:
    """The function of a method's folder, and its settings."""
    file = folder / "method.py"
    if not file.is_file():
        raise SystemExit(
            f"{file} is missing: a method is a folder with method.py (open/README.md)."
        )
    merge = runpy.run_path(str(file)).get("merge")
    if not callable(merge):
        raise SystemExit(f"{file} has no function merge(host, concepts, calibration, …).")
    settings = folder / "settings.json"
    return merge, json.loads(settings.read_text()) if settings.is_file() else {}


class OpenRuns(Runs):
    """Merges by somebody's function."""

    def __init__(self, world: World, cache: Path, merge: Merge) -> None:
        super().__init__(world, cache)
        self._merge = merge

    def lora_of(self, unit: Unit, concepts: Sequence[Concept]) -> Lora:
        return self._merge(self.world.host, concepts, self.calibration(unit), **unit.settings)


def measured(
    name: str, plan: Plan, alone: Runs, merged: Runs, until: float = float("inf")
) -> dict[str, Any]:
    """By number of LoRAs: means of all figures with intervals over sets, and the costs."""
    merges = (unit for _, unit in plan.merges())
    for runs, units in ((alone, plan.references()), (merged, merges)):
        if not runs.run(units, until - time.monotonic()):
            raise SystemExit("stopped by --seconds; the next run goes on")
    sizes: dict[str, Any] = {}
    for size in plan.sizes:
        of = figures(rows_of_size(plan, size, alone, merged), name)["rows"]
        units = [unit for _, unit in plan.merges() if len(unit.names) == size]
        sizes[str(size)] = {
            "figures": of[name],
            "costs": standings.costs(merged.known[unit.key] for unit in units),
        }
    settings = dict(plan.variants[0].settings)
    return rounded({"method": name, "settings": settings, "sizes": sizes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world", default="reported", help=HELP)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--sets", type=int, default=SETS, help="of each size, at most")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    merge, settings = loaded(asked.folder)
    name, label = asked.folder.resolve().name, Path(asked.world).stem
    world, whole = world_of(asked.world), asked.world in WORLDS
    sizes, variant = sizes_in(world, asked.sizes), Variant(name, name, settings, {})
    plan = Plan(world, [variant], sizes, 1, asked.sets)
    alone = Runs(world, result_file(f"unseen_{label}_alone.jsonl", whole=whole))
    merged = OpenRuns(world, BUILD / "open" / f"{label}_{name}.jsonl", merge)
    found = measured(name, plan, alone, merged, until)
    file = result_file(f"open/{name}.json", whole=whole)
    write(file, {"world": label, **found})
    shown = ("reported", RESULTS) if whole else (label, file.parents[1])
    page = BUILD / ("standings.html" if whole else f"standings_{label}.html")
    page.write_text(standings.page(*shown), encoding="utf-8")
    print(f"{page}: {name} among {len(standings.rows(str(sizes[0]), *shown)) - 1} others")


if __name__ == "__main__":
    main()
