"""Settings of the rivals, chosen per number of merged LoRAs on concepts that are not reported.

``python benchmarks/protocol_tuning.py`` measures grids on the toybox's own ten concepts and writes
the best (mean of likeness and text) into ``benchmarks/results/reported_settings.json``; what is
measured is kept in ``build/tuning.jsonl``. Where nothing was found yet a rival has what was found
on two pairs (``quality.TUNED``).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from protocol.plan import METHODS, REGIMES, Unit, sets_of, uses_data
from protocol.runs import Runs
from protocol.toybox import ToyboxWorld
from protocol.world import Wanted
from quality import GRIDS, TUNED

from iteris_core.saving import atomically

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "reported_settings.json"
CACHE = Path("build/tuning.jsonl")


@lru_cache
def _found() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def settings_of(method: str, size: int, regime: str) -> Mapping[str, Any]:
    """The settings of ``method`` where ``size`` LoRAs are merged; of ours always the defaults."""
    of = _found().get(method, {})
    if not uses_data(method):
        regime = "default"
    found = of.get(regime, {}).get(str(size))
    return TUNED.get(method, {}) if found is None else found


class TuningWorld(ToyboxWorld):
    """The toybox's own concepts, each by itself only: grids have many settings."""

    def together(self, names: Sequence[str], seed: int) -> list[Wanted]:
        return []


class Tuning:
    def __init__(self, seconds: float) -> None:
        self._world = TuningWorld()
        self._runs = Runs(self._world, CACHE)
        self._until = time.monotonic() + seconds

    def best(self, method: str, size: int, regime: str) -> Mapping[str, Any]:
        """The setting of the grid with the best mean of likeness and text over one set (of two and
        three LoRAs: over as many sets as make six subjects)."""
        sets = sets_of(self._world.subjects, size, 0)[: max(1, 6 // size)]

        def score(settings: Mapping[str, Any]) -> float:
            wanted = [Unit(method, names, regime, 0, settings) for names in sets]
            if not self._runs.run(wanted, self._until - time.monotonic()):
                raise TimeoutError
            pictures = [row for unit in wanted for row in self._runs.known[unit.key]["alone"]]
            return fmean((judged["image"] + text) / 2 for _, judged, text in pictures)

        return max(GRIDS[method], key=score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after")
    parser.add_argument("--methods", default="", help="with commas between; all that have a grid")
    parser.add_argument("--regimes", default=",".join(REGIMES))
    arguments = parser.parse_args()
    names = [m for m in arguments.methods.split(",") if m]
    names = names or [m for m in METHODS if len(GRIDS.get(m, ())) > 1]
    tuning = Tuning(arguments.seconds)
    found: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    try:
        for method, regime in product(names, arguments.regimes.split(",")):
            if regime != "default" and not uses_data(method):
                continue
            for size in ToyboxWorld.sizes:
                best = tuning.best(method, size, regime)
                found.setdefault(method, {}).setdefault(regime, {})[str(size)] = best
    except TimeoutError:
        print("stopped by --seconds")
    with atomically(FILE) as path:
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
