"""How few prompts are enough: ours and the two nearest rivals by prompts and timesteps.

``python benchmarks/reported_grid.py`` writes ``benchmarks/results/reported_grid.json``, of the ten
concepts of ``reported.py`` and with its sets, seeds and kept runs, so that the grid's two ends are
those of its two regimes. Between them rivals have the settings of the nearer end. ``--seconds``
stops it by itself; QUICK=1 takes two concepts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from outputs import QUICK, result_file, write
from protocol.plan import BASE, OURS, REPLICATES, SINGLE, Unit, units
from protocol.runs import Runs
from protocol.table import Table
from reported import CHOSEN, world

GRID = {"1 x 1": "few", "2 x 2": "2x2", "6 x 1": "6x1", "12 x 4": "12x4", "50 x 4": "default"}
"""Prompts x timesteps → regime of the plan"""
SIZES = (2,) if QUICK else (2, 5, 10)
METHODS = (OURS, "regmean++", "ssr")


def plan(subjects: Sequence[str], replicates: int, trained: int) -> list[Unit]:
    """Replicate by replicate, and in each, after what all need, the fewest prompts first."""
    every = units(
        subjects,
        (),
        SIZES,
        CHOSEN,
        methods=(SINGLE, BASE, *METHODS),
        regimes=tuple(GRID.values()),
        replicates=replicates,
        trained=trained,
    )
    place = {regime: number for number, regime in enumerate(GRID.values())}
    return sorted(
        every,
        key=lambda u: (u.replicate, place[u.regime] if u.method in METHODS else -1, len(u.names)),
    )


def figures(found: Table) -> dict[str, Any]:
    """``grid``: prompts x timesteps → concepts → the rows of the protocol."""
    known = found.figures()["regimes"]
    return {"grid": {point: known.get(regime, {}) for point, regime in GRID.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing after these"
    )
    parser.add_argument("--replicates", type=int, default=1 if QUICK else REPLICATES)
    asked = parser.parse_args()
    toybox = world()
    runs = Runs(toybox, result_file("reported_runs.jsonl"))
    wanted = plan(toybox.subjects, asked.replicates, toybox.trained)
    whole = runs.run(wanted, asked.seconds)
    measured = sum(unit.key in runs.known for unit in wanted)
    data = {
        "measured": measured,
        "planned": len(wanted),
        **figures(Table(wanted, runs.known, toybox.collapse_below)),
    }
    write(result_file("reported_grid.json"), data)
    ended = "" if whole else ", stopped by --seconds"
    print(f"{measured} of {len(wanted)} measured{ended}")


if __name__ == "__main__":
    main()
