"""The field's protocol on ten concepts that nobody looked at while choosing anything.

``python benchmarks/reported.py`` writes ``benchmarks/results/reported.json``. What is measured is
kept in ``benchmarks/results/reported_runs.jsonl`` as it comes, so that a run that was stopped goes
on; ``--seconds`` stops it by itself. QUICK=1 takes few methods at two sizes, and writes into
``build/quick/``.

The concepts are those of ``reported_concepts.py``; rivals have the settings that
``reported_tuning.py`` found on the toybox's own ten, per number of merged LoRAs; ``iteris`` has its
defaults.
"""

from __future__ import annotations

from pathlib import Path

from outputs import RESULTS
from protocol.command import Tables
from protocol.settings import Chosen
from protocol.toybox import ToyboxWorld
from quality import TUNED

CHOSEN = Chosen(RESULTS / "reported_settings.json", TUNED)
"""Where no search has been yet: what was best on two pairs of the toybox's own concepts."""


def world() -> ToyboxWorld:
    return ToyboxWorld(Path(__file__).parent / "reported")


if __name__ == "__main__":
    Tables("reported", world, CHOSEN).main(__doc__)
