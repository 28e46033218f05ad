"""Settings for the language table, tried where no test text is: on LoRAs of `emotion.py --tuning`.

    python benchmarks/emotion.py --tuning       the LoRAs, on four fifths of the training texts
    python benchmarks/language_tuning.py        results/language_tuning.json

All tasks that have such a LoRA are merged from 50 texts each that it was trained on, drawn
`--draws` times. The sum of macro F1 is over the last fifth of the training texts, which neither a
LoRA nor a merge has seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emotion import TEXTS, TUNING
from language import Bench
from outputs import result_file, write

from iteris_core.score.statistics import over_seeds

_CLASSIFIERS: dict[str, Any] = {"shrink": 0.5}
GRID: list[tuple[str, dict[str, Any]]] = [
    ("average", {}),
    ("regmean", {"shrink": 0.9}),
    ("ssr", {}),
    ("iteris", {}),
    ("iteris", _CLASSIFIERS),
    ("iteris", {"objective": "adapter", "shrink": 0.5}),
    ("iteris", {"objective": "adapter", "shrink": 0.9}),
    ("iteris", {**_CLASSIFIERS, "weighting": "none"}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=TEXTS)
    parser.add_argument("--draws", type=int, default=2)
    arguments = parser.parse_args()
    cache = Path("build/language_tuning.jsonl")
    bench = Bench(arguments.data, TUNING, ("fit", "held"), cache)
    names = list(bench.loras)
    found: dict[str, Any] = {
        "alone": {name: round(bench.alone(name), 4) for name in names},
        "texts": {name: len(bench.texts[name][0]) for name in names},
        "draws": arguments.draws,
        "merges": [],
    }
    for method, settings in GRID:
        seeds = range(arguments.draws if method != "average" else 1)
        rows = [bench.row(names, method, settings, seed=seed) for seed in seeds]
        total = over_seeds([sum(row.values()) for row in rows], seeds)
        tasks = {name: round(sum(row[name] for row in rows) / len(rows), 4) for name in names}
        found["merges"].append(
            {
                "method": method,
                "settings": settings,
                "sum": round(total.mean, 4),
                "standard_error": total.to_dict()["se"],
                "tasks": tasks,
            }
        )
        write(result_file("language_tuning.json"), found)


if __name__ == "__main__":
    main()
