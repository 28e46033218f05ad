"""The rivals' settings for each number of LoRAs, on concepts of a world that no table reports.

``python benchmarks/search_settings.py --world toybox|emoji`` measures grids and writes the best
settings, by the mean of likeness and text alignment on new words, into
``benchmarks/results/reported_settings.json`` or ``emoji_settings.json`` as they are found. What is
measured is kept in ``build/``, so that a search that was stopped goes on. Settings that are in
these files already were found on calibration prompts, at commit 394a4c3.
"""

from __future__ import annotations

import argparse

from outputs import BUILD
from protocol.plan import REGIMES
from protocol.runs import Runs
from protocol.tuning import Tuning
from protocol.world import World
from worlds import settings_of, toybox


def emoji() -> World:
    from protocol.emoji import EmojiWorld

    return EmojiWorld(tuning=True)


SEARCHES = {"toybox": (toybox, "reported"), "emoji": (emoji, "emoji")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=SEARCHES, default="toybox")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing after these"
    )
    parser.add_argument("--methods", nargs="*", default=[], help="all that have a grid")
    parser.add_argument("--regimes", nargs="*", default=list(REGIMES), choices=REGIMES)
    asked = parser.parse_args()
    load, name = SEARCHES[asked.world]
    runs = Runs(load(), BUILD / f"{name}_tuning.jsonl")
    whole = Tuning(runs, settings_of(name), asked.seconds).search(asked.methods, asked.regimes)
    print("all settings are known" if whole else "stopped by --seconds")


if __name__ == "__main__":
    main()
