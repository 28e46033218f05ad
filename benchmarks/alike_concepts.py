"""Ten concepts of two classes, on which concepts that are alike are reported.

``python benchmarks/alike_concepts.py`` writes ``benchmarks/alike/world.json``: five circles and
five squares by the rule of :mod:`reported_concepts`, unlike the toybox's own and the reported ones.
Training them: ``python -m toybox.train --step loras --world benchmarks/alike --work build/alike``.
What was chosen for alike concepts was chosen on the toybox's three stars.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reported_concepts import ROOT as REPORTED
from reported_concepts import chosen, write_world

import toybox

ROOT = Path(__file__).parent / "alike"
SEED = 2027
FIRST_NUMBER = 200
WORDS = ("circle",) * 5 + ("square",) * 5


def alike() -> list[dict[str, Any]]:
    others = [toybox.concepts(), toybox.pivotal_concepts(), toybox.concepts(REPORTED)]
    known = [concept for some in others for concept in some.values()]
    return chosen(WORDS, SEED, known)


if __name__ == "__main__":
    write_world(ROOT, FIRST_NUMBER, alike())
