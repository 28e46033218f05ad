"""Variants of ``iteris`` on compositions that the quality suite does not report.

``python benchmarks/ablations.py [--only NAME;…]`` prints a table and writes
``benchmarks/results/ablations.json``: scores with standard errors over seeds on the two tuning
pairs and on five concepts. Results are cached with the suite's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quality import CACHE, RESULTS, TUNING, Suite, World

FIVE = ((2, 3, 5, 7, 9),)
COLUMNS = ("mean", "image", "text", "judge", "pair")


@dataclass(frozen=True)
class Variant:
    """What differs from the defaults. ``minimax`` weighs the concepts by the squared output error
    that the default leaves them; ``preserve`` is the weight of prompts without triggers."""

    settings: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    minimax: bool = False
    preserve: float = 0.0


BEFORE: dict[str, Any] = {"ridge": 1e-5, "focus": 0.0}
"""What most variants differ from: the defaults when they were measured."""


def before(**settings: Any) -> Variant:
    return Variant({**BEFORE, **settings})


def jacobi(iterations: int, **more: Any) -> Variant:
    return before(schedule="jacobi", iterations=iterations, **more)


VARIANTS: dict[str, Variant] = {
    "default": Variant(),
    "focus=0": Variant({"focus": 0.0}),
    "ridge=1e-05, focus=0": before(),
    "repair=false": before(repair=False),
    "align=adapter": before(align="adapter"),
    "balance=adapter (eq. 8)": before(balance="adapter"),
    "balance=full": before(balance="full"),
    "balance=none": before(balance="none"),
    "paper: adapter, eq. 8, ridge 1e-4": before(align="adapter", balance="adapter", ridge=1e-4),
    **{f"ridge={r:g}": before(ridge=r) for r in (0.0, 1e-7, 1e-4, 1e-3, 1e-2)},
    **{f"jacobi, {k} iterations": jacobi(k) for k in (1, 2, 3, 5, 8, 12)},
    **{
        f"paper, jacobi, {k} iterations": jacobi(k, align="adapter", balance="adapter", ridge=1e-4)
        for k in (1, 2, 5, 10)
    },
    **{f"samples={n}": Variant(BEFORE, {"samples": n}) for n in (6, 12, 25, 100)},
    **{f"timesteps={n}": Variant(BEFORE, {"timesteps": n}) for n in (1, 2, 8)},
    "latents=noise": Variant(BEFORE, {"latents": "noise"}),
    "guidance=4 while denoising": Variant(BEFORE, {"guidance": 4.0}),
    **{f"empty_share={s:g}": Variant(BEFORE, {"empty_share": s}) for s in (0.0, 0.4)},
    **{f"preserve, weight {w:g}": Variant(BEFORE, preserve=w) for w in (0.1, 1.0)},
    "minimax": Variant(BEFORE, minimax=True),
    "rank=8": Variant({"rank": 8}),
    "rank=16": Variant({"rank": 16}),
    "polish, 100 steps": Variant({"polish_steps": 100}),
}


def weigh_by_error(suite: Suite, numbers: Sequence[int]) -> list[float]:
    """Weights that sum to the number of concepts, from the residuals of the default."""
    suite.measure(numbers, "iteris")
    left = [error**2 for error in suite.entry(numbers, "iteris")["residuals"]]
    return [round(error / sum(left) * len(left), 4) for error in left]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names of variants, separated by ;")
    arguments = parser.parse_args()
    suite = Suite(World(), CACHE)
    names = arguments.only.split(";") if arguments.only else list(VARIANTS)
    data: dict[str, Any] = {}
    for name in names:
        variant = VARIANTS[name]
        data[name] = {
            label: {
                column: stat.to_dict()
                for column, stat in suite.total(
                    sets,
                    "iteris",
                    variant.settings,
                    variant.calibration,
                    (lambda numbers: weigh_by_error(suite, numbers)) if variant.minimax else None,
                    variant.preserve,
                ).items()
            }
            for label, sets in (("two", TUNING), ("five", FIVE))
        }
        print(name)
        for label, row in data[name].items():
            cells = (f"{c} {row[c]['mean']:.3f} ± {row[c]['se']:.3f}" for c in COLUMNS)
            print(f"  {label:5}", "  ".join(cells), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ablations.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
