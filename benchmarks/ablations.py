"""Variants of ``iteris`` on compositions that the quality suite does not report.

``python benchmarks/ablations.py [--only NAME;…]`` prints a table and writes it to
``benchmarks/results/ablations.json`` as it comes: scores with standard errors over seeds on the two
tuning pairs and on five concepts. Results are cached with the suite's; with ``--only`` the other
rows of the file stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from outputs import read, result_file, write
from quality import CACHE, TUNING, Suite, World

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


PAPER: dict[str, Any] = {"align": "adapter", "balance": "adapter", "ridge": 1e-4, "focus": 0.0}
"""The paper's objective and its ridge; it has neither repair nor focus."""


def of(**settings: Any) -> Variant:
    return Variant(settings)


VARIANTS: dict[str, Variant] = {
    "default": of(),
    "focus=0": of(focus=0.0),
    "ridge=1e-05, focus=0": of(ridge=1e-5, focus=0.0),
    "repair=false": of(repair=False),
    **{f"repair_inputs={share:g}": of(repair_inputs=share) for share in (0.25, 0.5, 1.0)},
    "align=adapter": of(align="adapter"),
    "balance=adapter (eq. 8)": of(balance="adapter"),
    "balance=full": of(balance="full"),
    "balance=none": of(balance="none"),
    "paper: adapter, eq. 8, ridge 1e-4": of(**PAPER),
    **{f"ridge={r:g}": of(ridge=r) for r in (0.0, 1e-7, 1e-5, 1e-4, 1e-2)},
    **{f"samples={n}": Variant({}, {"samples": n}) for n in (6, 12, 25, 100)},
    "latents=noise": Variant({}, {"latents": "noise"}),
    **{f"preserve, weight {w:g}": Variant(preserve=w) for w in (0.1, 1.0)},
    "minimax": Variant(minimax=True),
    "rank=8": of(rank=8),
    "rank=16": of(rank=16),
    "polish, 100 steps": of(polish_steps=100),
    **{
        f"paper, jacobi, {k} iterations": of(schedule="jacobi", iterations=k, **PAPER)
        for k in (1, 2, 3, 5, 10)
    },
    **{
        f"jacobi, {k} iterations": of(schedule="jacobi", iterations=k, ridge=1e-5, focus=0.0)
        for k in (1, 2, 3, 5, 8, 12)
    },
    **{f"timesteps={n}": Variant({}, {"timesteps": n}) for n in (1, 2, 8)},
    "guidance=4 while denoising": Variant({}, {"guidance": 4.0}),
    **{f"empty_share={s:g}": Variant({}, {"empty_share": s}) for s in (0.0, 0.4)},
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
    file = result_file("ablations.json")
    known = read(file) if arguments.only else {}
    for name in names:
        variant = VARIANTS[name]
        known[name] = {
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
        for label, row in known[name].items():
            cells = (f"{c} {row[c]['mean']:.3f} ± {row[c]['se']:.3f}" for c in COLUMNS)
            print(f"  {label:5}", "  ".join(cells), flush=True)
        data = {name: known[name] for name in VARIANTS if name in known}
        write(file, data)


if __name__ == "__main__":
    main()
