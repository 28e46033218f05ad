"""Settings of the rivals, chosen per number of merged LoRAs on the toybox's own ten concepts.

``python benchmarks/reported_tuning.py`` measures grids and writes the best settings (mean of
likeness and text) into ``benchmarks/results/reported_settings.json`` as they are found; what is
measured is kept in ``build/reported_tuning.jsonl``. It goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.command import search_settings
from protocol.toybox import ToyboxWorld
from protocol.world import Wanted
from reported import CHOSEN


class TuningWorld(ToyboxWorld):
    """The toybox's own concepts, each by itself only: grids have many settings."""

    def together(self, names: Sequence[str], seed: int) -> list[Wanted]:
        return []


if __name__ == "__main__":
    search_settings("reported", TuningWorld, CHOSEN, __doc__)
