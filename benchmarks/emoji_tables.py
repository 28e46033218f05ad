"""The field's protocol on the world of emoji, into ``benchmarks/results/emoji.json``.

As ``reported.py``: what is measured is kept in ``benchmarks/results/emoji_runs.jsonl``, and a run
that was stopped goes on. ``--tune`` looks for the rivals' settings on subjects that are not
reported, into ``benchmarks/results/emoji_settings.json``.
"""

from __future__ import annotations

import sys

from outputs import RESULTS
from protocol.command import Tables, search_settings
from protocol.emoji import EmojiWorld
from protocol.settings import Chosen
from quality import TUNED

CHOSEN = Chosen(RESULTS / "emoji_settings.json", TUNED)
"""Where no search has been yet: what was best on two pairs of the toybox."""


def tuning_world() -> EmojiWorld:
    return EmojiWorld(tuning=True)


if __name__ == "__main__":
    if "--tune" in sys.argv:
        sys.argv.remove("--tune")
        search_settings("emoji", tuning_world, CHOSEN, __doc__)
    else:
        Tables("emoji", EmojiWorld, CHOSEN, quick_sizes=(2,)).main(__doc__)
