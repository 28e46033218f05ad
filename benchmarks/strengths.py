"""A merged LoRA loaded at other strengths: ``python benchmarks/strengths.py``.

Three of the reported concepts, merged once and drawn on new words at each of :data:`STRENGTHS`;
each LoRA alone is loaded at the same one. What is kept is a share of what the LoRAs alone add at
strength 1. Writes ``results/strengths.json`` and goes on where it stopped (``--seconds``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace

from outputs import result_file, rounded, write
from page_tables import strengths as table
from protocol.figures import figures, joined, rows_of_size
from protocol.plan import SINGLE, Plan, Unit, Variant
from protocol.runs import Entry, Runs
from worlds import reported

from iteris_core import Concept, Lora

SIZE, SETS, REPLICATES = 3, 3, 1
STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5)
METHODS = ("iteris", "chain-of-merges", "average", SINGLE)
KINDS = ("new words", "no trigger")


class StrengthRuns(Runs):
    """Merges at the strength that a unit's settings name."""

    _of_merge: tuple[str, Lora] | None = None

    def measure(self, unit: Unit) -> Entry:
        if unit.method != SINGLE or len(unit.names) == 1:
            return super().measure(unit)
        return joined((self.measure(replace(unit, names=(n,))) for n in unit.names), KINDS)

    def _merged(self, unit: Unit) -> tuple[Lora | None, Entry]:
        lora, entry = super()._merged(unit)
        return (lora and at_strength(lora, unit.settings["strength"])), entry

    def lora_of(self, unit: Unit, concepts: Sequence[Concept]) -> Lora:
        """Strength by strength the same merge, which is made once."""
        plain = replace(unit, settings={})
        if self._of_merge is None or self._of_merge[0] != plain.key:
            self._of_merge = plain.key, super().lora_of(plain, concepts)
        return self._of_merge[1]


def at_strength(lora: Lora, strength: float) -> Lora:
    return Lora({site: change.scaled(strength) for site, change in lora.sites.items()})


def label(method: str, strength: float) -> str:
    return f"{method}:strength={strength:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after")
    until = time.monotonic() + parser.parse_args().seconds
    world, whole_world = reported(), reported()
    world.kinds = KINDS
    variants = [Variant.parsed(label(m, s)) for m in METHODS for s in STRENGTHS]
    plan = Plan(world, variants, [SIZE], REPLICATES, lambda *_: {}, SETS)
    alone = Runs(whole_world, result_file("unseen_reported_alone.jsonl"))
    merged = StrengthRuns(world, result_file("strengths_runs.jsonl"))
    whole = alone.run(plan.references(), until - time.monotonic())
    if not (whole and merged.run((u for _, u in plan.merges()), until - time.monotonic())):
        raise SystemExit("stopped by --seconds; the next run goes on")
    rows = rows_of_size(plan, SIZE, alone, merged)
    data = rounded({"sizes": {str(SIZE): figures(rows, label("iteris", 1.0))}})
    write(result_file("strengths.json"), data)
    print("\n".join([*table("likeness kept"), "", *table("judge kept")]))


if __name__ == "__main__":
    main()
