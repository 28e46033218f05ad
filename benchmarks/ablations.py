"""Variants of ``iteris`` on compositions that the quality suite does not report.

``python benchmarks/ablations.py [--only NAME,…]`` prints a table and writes
``benchmarks/results/ablations.json``: image, text, judge and pair with standard errors over seeds,
on the two tuning pairs, on five and on seven concepts. Results are cached with the suite's.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from quality import CACHE, COLUMNS, RESULTS, TUNING, Suite, World

FIVE = ((2, 3, 5, 7, 9),)
SEVEN = ((1, 3, 5, 7, 8, 9, 10),)

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "align=adapter": ({"align": "adapter"}, {}),
    "balance=adapter (eq. 8)": ({"balance": "adapter"}, {}),
    "balance=full": ({"balance": "full"}, {}),
    "balance=none": ({"balance": "none"}, {}),
    "paper: adapter, eq. 8, ridge 1e-4": (
        {"align": "adapter", "balance": "adapter", "ridge": 1e-4},
        {},
    ),
    **{f"ridge={r:g}": ({"ridge": r}, {}) for r in (0.0, 1e-7, 1e-6, 1e-4, 1e-3, 1e-2)},
    **{
        f"jacobi, {k} iterations": ({"schedule": "jacobi", "iterations": k}, {})
        for k in (1, 2, 3, 5, 8, 12)
    },
    **{f"samples={n}": ({}, {"samples": n}) for n in (6, 12, 25, 100)},
    **{f"timesteps={n}": ({}, {"timesteps": n}) for n in (1, 2, 8)},
    "latents=noise": ({}, {"latents": "noise"}),
    "guidance=4 while denoising": ({}, {"guidance": 4.0}),
    **{f"empty_share={s:g}": ({}, {"empty_share": s}) for s in (0.0, 0.1, 0.4)},
    "rank=8": ({"rank": 8}, {}),
    "rank=16": ({"rank": 16}, {}),
    "polish, 100 steps": ({"polish_steps": 100}, {}),
    "polish, 300 steps": ({"polish_steps": 300}, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    suite = Suite(World(), CACHE)
    names = arguments.only.split(",") if arguments.only else list(VARIANTS)
    data: dict[str, Any] = {}
    for name in names:
        settings, calibration = VARIANTS[name]
        data[name] = {
            label: {
                column: stat.to_dict()
                for column, stat in suite.total(sets, "iteris", settings, calibration).items()
            }
            for label, sets in (("two", TUNING), ("five", FIVE), ("seven", SEVEN))
        }
        print(name)
        for label, row in data[name].items():
            cells = (f"{c} {row[c]['mean']:.3f} ± {row[c]['se']:.3f}" for c in COLUMNS)
            print(f"  {label:5}", "  ".join(cells))
    if not arguments.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "ablations.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
