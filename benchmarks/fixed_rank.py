"""Ten concepts in a LoRA as large as one of them: ``python benchmarks/fixed_rank.py``.

Merges ten LoRAs of rank 8, on which nothing was tuned, at rank 8, and draws them on new words as in
``unseen.py``. Rivals use their authors' settings, except ``scale``, which is the best of three on
the reported images themselves. Writes ``results/fixed_rank.json``; measurements are stored line by
line beside it, so an interrupted run resumes (``--seconds``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from statistics import fmean

from outputs import result_file, rounded, write
from page_tables import unseen as table
from protocol.plan import Plan, Unit, Variant
from protocol.runs import Runs
from unseen import results
from worlds import reported

RANK, SIZE = 8, 10
KIND = "new words"
SCALES: Mapping[str, Sequence[float]] = {
    "compress-then-merge": (0.75, 0.4, 0.2),
    "pico": (1.0, 0.6, 0.3),
    "tsv-m": (0.5, 0.3, 0.8),
    "iso-c": (0.5, 0.3, 0.15),
    "core-space": (1.0, 1.5, 0.6),
    "task-arithmetic": (0.4, 0.2, 0.1),
}
OURS = f"iteris:rank={RANK}:share_ranks=true"
POLISHED = f"{OURS}:block_steps=120"
EACH = f"iteris:rank={RANK}"
OWN_LAYERS = f"{EACH}:repair=false"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after")
    until = time.monotonic() + parser.parse_args().seconds
    world = reported()
    world.kinds = (KIND,)
    alone = Runs(world, result_file("unseen_reported_alone.jsonl"))
    merged = Runs(world, result_file("fixed_rank_runs.jsonl"))
    turns = [[f"{m}:rank={RANK}:scale={of[turn]}" for m, of in SCALES.items()] for turn in range(3)]
    labels = (OURS, *turns[0], POLISHED, *turns[1], *turns[2], EACH, OWN_LAYERS)
    every = [Variant.parsed(label) for label in labels]
    whole = Plan(world, every, [SIZE], 1, lambda *_: {})
    alone.run(whole.references(), until - time.monotonic())
    merged.run((unit for _, unit in whole.merges()), until - time.monotonic())
    if not merged.known:
        raise SystemExit("stopped by --seconds before the first merge")

    def likeness(unit: Unit) -> float:
        return fmean(found["likeness"] for _, found in merged.known[unit.key][KIND])

    best: dict[str, tuple[float, Variant]] = {}
    for variant, unit in whole.merges():
        if unit.key in merged.known:
            name = variant.method if variant.method in SCALES else variant.label
            before = best.get(name, (-1.0, variant))
            best[name] = max(before, (likeness(unit), variant), key=lambda one: one[0])
    plan = Plan(world, [of for _, of in best.values()], [SIZE], 1, lambda *_: {})
    data = rounded(results(plan, alone, merged))
    data["bytes"] = {v.label: merged.known[unit.key]["bytes"] for v, unit in plan.merges()}
    write(result_file("fixed_rank.json"), data)
    print("\n".join(table(data, str(SIZE))))


if __name__ == "__main__":
    main()
