"""Merges on prompts that no calibration row had: ``python benchmarks/unseen.py --world toybox``.

Keeps what is measured line by line in ``benchmarks/results/unseen_WORLD_runs.jsonl`` (and
``…_alone.jsonl``), so that a run that was stopped goes on, and prints its tables: for each number
of concepts the means over sets, and the first method's difference to each other one, paired by set,
with its 95 % interval and ``first``, ``level``, ``behind`` or ``unknown``.
``build/standings_WORLD.html`` has them as a page. ``--tag NAME`` keeps the merges of another state
of the code apart, while the LoRAs alone and the base are shared. What is measured on a world of a
YAML file, your own checkpoint and LoRAs, or by your own method, is written into ``build/quick``.

A method is ``NAME[:FIELD=VALUE]…`` with fields of its settings or of the calibration: ``iteris``,
``iteris:ridge=1e-4``, ``iteris:samples=20``.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import rivals  # noqa: F401 (registers them)
import standings
from new_words_tables import FRONT, TOGETHER
from new_words_tables import unseen as table
from outputs import BUILD, asked, result_file, rounded
from protocol.figures import results
from protocol.plan import Plan, Unit
from protocol.runs import Runs, loaded
from worlds import HELP, WORLDS, sizes_in, world_of

METHODS = ",".join((*FRONT, *TOGETHER))


def kinds_of(world: str) -> tuple[type[Plan], type[Runs]]:
    if world == "styles":
        from protocol.styles import StyledPlan, StyledRuns

        return StyledPlan, StyledRuns
    if world == "pairs":
        from two_in_one import PairPlan, PairRuns

        return PairPlan, PairRuns
    if world.startswith("photos"):
        from protocol.classes import OneClass, SeveralClasses

        return (OneClass if world == "photos_class" else SeveralClasses), Runs
    return Plan, Runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="toybox", help=HELP)
    parser.add_argument("--sizes", default="2,3,5", help="how many concepts are merged")
    parser.add_argument("--methods", default=METHODS, help="the first is held against the others")
    parser.add_argument("--own", type=Path, metavar="FOLDER", help="your method (open/README.md)")
    parser.add_argument("--replicates", type=int, default=1)
    parser.add_argument("--sets", type=int, help="of each size and replicate, at most")
    parser.add_argument("--tag", default="", help="of the file, and of the merges that it keeps")
    given = asked(parser)
    methods = given.methods.split(",")
    if given.own:
        loaded(given.own)
        methods.append(os.path.join(".", given.own))  # a method of a folder has a slash
    world = world_of(given.world)
    plan_kind, runs_kind = kinds_of(given.world)
    plan = plan_kind(
        world,
        [Unit.parsed(label) for label in methods],
        sizes_in(world, [*map(int, given.sizes.split(","))]),
        given.replicates,
        given.sets,
    )
    name, known = f"unseen_{Path(given.world).stem}", given.world in WORLDS
    alone = runs_kind(world, result_file(f"{name}_alone.jsonl", whole=known))
    name += f"_{given.tag}" if given.tag else ""
    cache = result_file(f"{name}_runs.jsonl", whole=known)
    own = result_file(cache.name, whole=known and not given.own)
    merged = runs_kind(world, own, cache)
    done = alone.run(plan.references(), given.until - time.monotonic())
    done = done and merged.run(plan.merges(), given.until - time.monotonic())
    runs = {u.key: merged.known[u.key] for u in plan.merges() if u.key in merged.known}
    data = rounded(results(alone.known, runs, Unit.parsed(methods[0]).label))
    for size in data["sizes"]:
        print("", *table(data, size), sep="\n")
    page = BUILD / f"standings_{name.removeprefix('unseen_')}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(standings.page(Path(given.world).stem, data, runs), encoding="utf-8")
    print(f"\n{page}")
    if not done:
        print("\nstopped by --seconds")


if __name__ == "__main__":
    main()
