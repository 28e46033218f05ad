"""Weights of composites, and how many contexts go with them, on pairs that no table reports.

``python benchmarks/composites.py`` writes ``benchmarks/results/composites.json``: a subject of the
toybox with each style of ``benchmarks/styles`` that such a pair can have, on new words. What is
drawn is kept in ``build/composites``, so that a run that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

from outputs import result_file, write
from protocol.plan import BASE, SINGLE, Variant, styled_pairs
from protocol.styles import StyledPlan, StyledRuns, StyleWorld
from worlds import settings_of

PAIRS = 5
ROWS = (
    "sum",
    "iteris:composites=0:contexts=0.25",
    "iteris:composites=0.1:contexts=0.25",
    "iteris:composites=0.2:contexts=0.25",
    "iteris:composites=0.5:contexts=0.25",
    "iteris:composites=0.2:contexts=0.5",
)
COLUMNS = (
    ("styled", "judge"),
    ("styled", "style"),
    ("styled", "both"),
    ("subject", "judge"),
    ("style", "style"),
)
CACHE = Path("build/composites")


def pairs(world: StyleWorld) -> list[tuple[str, ...]]:
    """Those of later replicates that the table has not, each subject and style once."""
    reported = set(styled_pairs(world.subjects, world.styles, 0))
    chosen: list[tuple[str, ...]] = []
    for pair in _later(world):
        used = {name for one in chosen for name in one}
        if pair not in reported and not used & set(pair):
            chosen.append(pair)
        if len(chosen) == PAIRS:
            break
    return chosen


def _later(world: StyleWorld) -> Iterator[tuple[str, ...]]:
    for replicate in count(3):
        yield from styled_pairs(world.subjects, world.styles, replicate)


def main() -> None:
    world = StyleWorld()
    CACHE.mkdir(parents=True, exist_ok=True)
    alone, merged = (StyledRuns(world, CACHE / f"{name}.jsonl") for name in ("alone", "merged"))
    variants = [Variant.parsed(label) for label in ROWS]
    plan = StyledPlan(world, variants, [2], 1, settings_of("reported"), None)
    entries: dict[str, list[Any]] = {}
    for pair in pairs(world):
        (single,) = plan.references_of(SINGLE, pair, 0)
        alone.run([single, *plan.references_of(BASE, pair, 0)])
        entries.setdefault(SINGLE, []).append(alone.known[single.key])
        for variant in variants:
            unit = variant.unit(pair, 0, 0, plan.searched)
            merged.run([unit])
            entries.setdefault(variant.label, []).append(merged.known[unit.key])
    table = {
        label: {
            f"{kind}: {name}": round(
                fmean(fmean(of[name] for _, of in entry[kind]) for entry in some), 3
            )
            for kind, name in COLUMNS
        }
        for label, some in entries.items()
    }
    write(result_file("composites.json"), {"pairs": pairs(world), "rows": table})
    for label, row in table.items():
        print(label, row)


if __name__ == "__main__":
    main()
