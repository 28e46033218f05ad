"""Variants of ``iteris`` on compositions that the quality suite does not report.

``python benchmarks/ablations.py [--only NAME;…]`` prints a table and writes it to
``benchmarks/results/ablations.json`` as it comes: scores with standard errors over seeds on the two
tuning pairs and on five concepts. Results are cached with the suite's, whose kept runs have all of
these; with ``--only`` the other rows of the file stay. At two concepts variants have all inputs of
repair sites, as ``repair_inputs=1`` there, where the default has half of them: that is the row that
they are held against.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from outputs import read, result_file, write
from quality import CACHE, TUNING, Suite, World

FIVE = ((2, 3, 5, 7, 9),)
COLUMNS = ("mean", "image", "text", "judge", "pair")


@dataclass(frozen=True)
class Variant:
    """What differs from the defaults. ``minimax`` weighs the concepts by the squared output error
    that the default leaves them; ``preserve`` is the weight of prompts without triggers;
    ``all_inputs`` says that two concepts have all inputs of repair sites."""

    settings: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    minimax: bool = False
    preserve: float = 0.0
    all_inputs: bool = True

    def settings_for(self, label: str) -> dict[str, Any]:
        more = {"repair_inputs": 1.0} if self.all_inputs and label == "two" else {}
        return {**more, **self.settings}


PAPER: dict[str, Any] = {
    "objective": "adapter",
    "weighting": "adapter",
    "ridge": 1e-4,
    "saliency": 0.0,
}
"""The paper's objective and its ridge; it has neither repair nor saliency."""


def of(**settings: Any) -> Variant:
    return Variant(settings)


def plain(**settings: Any) -> Variant:
    """One that has nothing to do with repair, or says itself how much there is."""
    return Variant(settings, all_inputs=False)


VARIANTS: dict[str, Variant] = {
    "default": plain(),
    "saliency=0": of(saliency=0.0),
    "ridge=1e-05, saliency=0": of(ridge=1e-5, saliency=0.0),
    "repair=false": plain(repair=False),
    **{f"repair_inputs={share:g}": plain(repair_inputs=share) for share in (0.25, 0.5, 1.0)},
    "objective=adapter": plain(objective="adapter"),
    "weighting=adapter (eq. 8)": of(weighting="adapter"),
    "weighting=full": of(weighting="full"),
    "weighting=none": of(weighting="none"),
    "paper: adapter, eq. 8, ridge 1e-4": plain(**PAPER),
    **{f"ridge={r:g}": of(ridge=r) for r in (0.0, 1e-7, 1e-5, 1e-4, 1e-2)},
    **{f"samples={n}": Variant({}, {"samples": n}) for n in (6, 12, 25, 100)},
    "latents=noise": Variant({}, {"latents": "noise"}),
    **{f"preserve, weight {w:g}": Variant(preserve=w, all_inputs=False) for w in (0.1, 1.0)},
    "minimax": Variant(minimax=True),
    "rank=8": of(rank=8),
    "rank=16": of(rank=16),
    "polish, 100 steps": of(polish_steps=100),
    **{
        f"paper, jacobi, {k} iterations": plain(schedule="jacobi", iterations=k, **PAPER)
        for k in (1, 2, 5, 10)
    },
    **{
        f"jacobi, {k} iterations": of(schedule="jacobi", iterations=k, ridge=1e-5, saliency=0.0)
        for k in (1, 2, 3, 5, 8)
    },
}


def weigh_by_error(
    suite: Suite, numbers: Sequence[int], settings: Mapping[str, Any]
) -> list[float]:
    """Weights that sum to the number of concepts, from what ``settings`` leave them."""
    suite.measure(numbers, "iteris", settings)
    left = [error**2 for error in suite.entry(numbers, "iteris", settings)["residuals"]]
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
                    variant.settings_for(label),
                    variant.calibration,
                    partial(weigh_by_error, suite, settings=variant.settings_for(label))
                    if variant.minimax
                    else None,
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
