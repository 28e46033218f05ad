"""The field's protocol on ten concepts that nobody looked at while choosing anything.

``python benchmarks/reported.py`` writes ``benchmarks/results/reported.json``. What is measured is
kept in ``benchmarks/results/reported_runs.jsonl`` as it comes, so that a run that was stopped goes
on; ``--seconds`` stops it by itself. QUICK=1 takes three methods at two sizes, and writes into
``build/``.

The concepts are those of ``reported_concepts.py``; rivals have the settings that
``protocol_tuning.py`` found on the toybox's own ten, per number of merged LoRAs; ``iteris`` has its
defaults.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from protocol.plan import METHODS, OURS, REGIMES, REPLICATES, units
from protocol.runs import Runs
from protocol.table import Table
from protocol.toybox import ToyboxWorld
from protocol_tuning import settings_of

from iteris_core.saving import atomically

ROOT = Path(__file__).parent
QUICK = os.environ.get("QUICK") == "1"
FOLDER = Path("build") if QUICK else ROOT / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after")
    parser.add_argument("--methods", default="single,base,iteris,ssr" if QUICK else "")
    parser.add_argument("--sizes", default="2,5" if QUICK else "")
    parser.add_argument("--regimes", default=",".join(REGIMES))
    parser.add_argument("--replicates", type=int, default=1 if QUICK else REPLICATES)
    arguments = parser.parse_args()
    world = ToyboxWorld(ROOT / "reported")
    runs = Runs(world, FOLDER / "reported_runs.jsonl")
    sizes = [int(k) for k in arguments.sizes.split(",") if k] or world.sizes
    wanted = list(
        units(
            world.subjects,
            world.styles,
            sizes,
            settings_of,
            methods=[m for m in arguments.methods.split(",") if m] or METHODS,
            regimes=arguments.regimes.split(","),
            replicates=arguments.replicates,
        )
    )
    whole = runs.run(wanted, arguments.seconds)
    every = list(units(world.subjects, world.styles, world.sizes, settings_of))
    done = [unit for unit in every if unit.key in runs.known]
    table = Table(every, runs.known, world.collapse_below)
    data = {
        "default": OURS,
        "concepts": len(world.subjects),
        "collapse_below": world.collapse_below[0],
        "replicates": len({unit.replicate for unit in done}),
        "measured": len(done),
        "planned": len(every),
        "settings": {
            method: {
                regime: {str(k): settings_of(method, k, regime) for k in world.sizes}
                for regime in REGIMES
            }
            for method in dict.fromkeys(u.method for u in done if settings_of(u.method, 2, ""))
        },
        **table.figures(),
    }
    with atomically(FOLDER / "reported.json") as path:
        path.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{len(done)} of {len(every)} measured" + ("" if whole else ", stopped by --seconds"))


if __name__ == "__main__":
    main()
