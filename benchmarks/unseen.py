"""Merges on prompts that no calibration row had: ``python benchmarks/unseen.py --world toybox``.

Writes ``benchmarks/results/unseen_WORLD.json`` and prints its tables: for each number of concepts
the means over sets, and the first method's difference to each other one, paired by set, with its
95 % interval and ``first``, ``level``, ``behind`` or ``unknown``. What is measured is kept line by
line beside it, so that a run that was stopped goes on; ``--tag NAME`` keeps the merges of another
state of the code apart, while the LoRAs alone and the base are shared. What is measured on a world
of a YAML file, your own checkpoint and LoRAs, is written into ``build/quick``, with a page of it.

A method is ``NAME[:FIELD=VALUE]…`` with fields of its settings or of the calibration: ``iteris``,
``iteris:ridge=1e-4``, ``iteris:samples=20``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import standings
from outputs import result_file, rounded, write
from page_tables import FRONT, TOGETHER
from page_tables import unseen as table
from protocol.figures import figures, rows_of_size
from protocol.plan import Plan, Variant
from protocol.runs import Runs
from worlds import HELP, WORLDS, sizes_in, world_of

METHODS = ",".join((*FRONT, *TOGETHER))


def kinds_of(world: str) -> tuple[type[Plan], type[Runs]]:
    if world != "styles":
        return Plan, Runs
    from protocol.styles import StyledPlan, StyledRuns

    return StyledPlan, StyledRuns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="toybox", help=HELP)
    parser.add_argument("--sizes", default="2,3,5", help="how many concepts are merged")
    parser.add_argument("--methods", default=METHODS, help="the first is held against the others")
    parser.add_argument("--replicates", type=int, default=1)
    parser.add_argument("--sets", type=int, help="of each size and replicate, at most")
    parser.add_argument("--tag", default="", help="of the file, and of the merges that it keeps")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing after these"
    )
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    world = world_of(asked.world)
    plan_kind, runs_kind = kinds_of(asked.world)
    plan = plan_kind(
        world,
        [Variant.parsed(label) for label in asked.methods.split(",")],
        sizes_in(world, [2] if asked.world == "styles" else [*map(int, asked.sizes.split(","))]),
        asked.replicates,
        asked.sets,
    )
    name, whole = f"unseen_{Path(asked.world).stem}", asked.world in WORLDS
    alone = runs_kind(world, result_file(f"{name}_alone.jsonl", whole=whole))
    name += f"_{asked.tag}" if asked.tag else ""
    merged = runs_kind(world, result_file(f"{name}_runs.jsonl", whole=whole))
    done = alone.run(plan.references(), until - time.monotonic())
    done = done and merged.run((t for _, t in plan.merges()), until - time.monotonic())
    data = rounded(results(plan, alone, merged))
    write(result_file(f"{name}.json", whole=whole), data)
    for size in data["sizes"]:
        print("", *table(data, size), sep="\n")
    if not whole:
        page = result_file(f"{name}.html", whole=False)
        page.write_text(standings.page(Path(asked.world).stem, page.parent), encoding="utf-8")
        print(f"\n{page}")
    if not done:
        print("\nstopped by --seconds")


def results(plan: Plan, alone: Runs, merged: Runs) -> dict[str, Any]:
    ours = plan.variants[0].label
    return {
        "default": ours,
        "half": plan.world.half,
        "replicates": plan.replicates,
        "sizes": {
            str(size): figures(rows_of_size(plan, size, alone, merged), ours) for size in plan.sizes
        },
    }


if __name__ == "__main__":
    main()
