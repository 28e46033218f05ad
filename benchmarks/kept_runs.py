"""What was measured of ``iteris`` with other settings on any sets, of the suite's kept runs.

``python benchmarks/kept_runs.py '{"saliency": 0.0}'`` prints the means of image, text and both, the
judge's and the pairs', with standard errors over seeds, by the number of concepts, the seconds that
a merge took then, and the same against the default on the same sets, paired by set and seed.
Nothing is merged. ``--calibration`` takes the settings of the samples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from outputs import RESULTS
from quality import COLUMNS, Scores, row_of

RUNS = RESULTS / "quality_runs.jsonl"

Run = tuple[tuple[int, ...], Scores, float]
"""The set, its scores, and the seconds of its merge"""


def kept(
    settings: Mapping[str, Any], calibration: Mapping[str, Any], preserve: float = 0.0
) -> list[Run]:
    """What ran with exactly these."""
    found: list[Run] = []
    for line in RUNS.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        numbers, method, *said = json.loads(run["key"])
        weights, apart = said[2:] or (None, 0.0)
        same = said[:2] == [dict(settings), dict(calibration)] and apart == preserve
        if method == "iteris" and same and weights is None:
            found.append((tuple(numbers), run["scores"], run["merge_seconds"]))
    return found


def differences(ours: Sequence[Run], theirs: Sequence[Run]) -> list[Scores]:
    """Seed by seed, of the sets that both have."""
    other = {numbers: scores for numbers, scores, _ in theirs}
    return [
        {
            column: {seed: value - other[numbers][column][seed] for seed, value in by_seed.items()}
            for column, by_seed in scores.items()
        }
        for numbers, scores, _ in ours
        if numbers in other
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--calibration", type=json.loads, default={})
    parser.add_argument("--preserve", type=float, default=0.0, help="the weight of such prompts")
    parser.add_argument("--against", type=json.loads, default={}, help="in place of the default")
    arguments = parser.parse_args()
    runs = kept(arguments.settings, arguments.calibration, arguments.preserve)
    against = kept(arguments.against, {})
    for count in sorted({len(numbers) for numbers, *_ in runs}):
        some = [run for run in runs if len(run[0]) == count]
        print(f"{count} concepts:", *(" ".join(map(str, run[0])) for run in some), sep="  ")
        print(f"   {fmean(seconds for *_, seconds in some):.0f} s a merge, while others computed")
        _show("", row_of([scores for _, scores, _ in some]))
        if paired := differences(some, against):
            _show("difference", row_of(paired))


def _show(what: str, row: Mapping[str, Any]) -> None:
    print("  ", what, "  ".join(f"{c} {row[c]}" for c in ("mean", *COLUMNS) if c in row))


if __name__ == "__main__":
    main()
