"""The toybox suite: every method on sets of 2, 3, 5, 7 and 10 concepts, scored alike.

``python benchmarks/quality.py`` writes ``benchmarks/results/quality.json``; QUICK=1 takes a part of
the sets and methods, and what is a part goes into ``build/quick/``. Results are kept in
``build/quality.jsonl`` as they come, so that a run that was stopped goes on; delete that file to
start over. ``benchmarks/results/quality_runs.jsonl`` holds the runs behind the published figures;
copied to ``build/quality.jsonl`` it spares them.

Each rival is tuned on two pairs that are not reported, on a grid of at most six settings around its
best published one (``--tune`` does it again, in an hour or more; ``TUNED`` keeps what it found);
``iteris`` has its defaults. Three seeds of pictures, standard errors over them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from outputs import QUICK, result_file, write
from PIL import Image
from toybox_world import COLUMNS, SEEDS, World

from iteris_core import Calibration, Concept, MergeReport, merge_loras
from iteris_core.score.statistics import Stat, over_seeds
from toybox import PAIR_TEMPLATES, TEMPLATES

CACHE = Path("build/quality.jsonl")

PAIRS = ((1, 4), (2, 6), (1, 2), (4, 5), (6, 7), (9, 10), (3, 8))
TRIPLES = ((1, 4, 6), (2, 5, 8), (3, 7, 10), (1, 2, 3), (4, 6, 9))
SETS: dict[str, Sequence[tuple[int, ...]]] = {
    "2": PAIRS[:3] if QUICK else PAIRS,
    "3": TRIPLES[:1] if QUICK else TRIPLES,
    "5": ((1, 4, 6, 8, 10),),
    "7": ((1, 2, 4, 5, 6, 8, 10),),
    "10": (tuple(range(1, 11)),),
}
TUNING = ((3, 5), (8, 9))

_DENSITY = ({"density": d, "scale": s} for d in (0.2, 0.5, 0.8) for s in (0.7, 1.0))
GRIDS: dict[str, list[dict[str, Any]]] = {
    "iteris": [{}],
    "average": [{}],
    "sum": [{}],
    "svd": [{}],
    "task-arithmetic": [{"scale": s} for s in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)],
    "ties": list(_DENSITY),
    "dare-linear": [{"density": d, "scale": s} for d in (0.5, 0.8) for s in (0.4, 0.6, 0.8)],
    "dare-ties": [{"density": d, "scale": s} for d in (0.5, 0.8) for s in (0.6, 0.8, 1.0)],
    "knots": [{"density": d, "scale": s} for d in (0.3, 0.6, 1.0) for s in (0.7, 1.0)],
    "orthogonal": [{"softness": f, "scale": s} for f in (0.0, 1.0) for s in (0.5, 0.7, 1.0)],
    "regmean": [{"shrink": s} for s in (0.7, 0.9, 0.99, 1.0)],
    "regmean++": [{"shrink": s} for s in (0.7, 0.9, 0.99, 1.0)],
    "ssr": [{"ridge": r} for r in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)],
    "custom-diffusion": [{"ridge": r} for r in (1e-8, 1e-6, 1e-4, 1e-3)],
    "iteris-subspace": [{"ridge": r} for r in (1e-6, 1e-5, 1e-4)],
}
# The best of each grid on the tuning pairs (mean of image and text).
TUNED: dict[str, dict[str, Any]] = {
    "task-arithmetic": {"scale": 0.7},
    "ties": {"density": 0.8, "scale": 1.0},
    "dare-linear": {"density": 0.8, "scale": 0.4},
    "dare-ties": {"density": 0.5, "scale": 0.6},
    "knots": {"density": 0.3, "scale": 0.7},
    "orthogonal": {"softness": 0.0, "scale": 0.5},
    "regmean": {"shrink": 1.0},
    "regmean++": {"shrink": 1.0},
    "ssr": {"ridge": 1e-2},
    "custom-diffusion": {"ridge": 1e-8},
    "iteris-subspace": {"ridge": 1e-5},
}
# Settings of `iteris` reported beside its defaults: with gradients, and at one LoRA's rank.
VARIANTS: dict[str, dict[str, Any]] = {
    "iteris-polish": {"polish_steps": 300},
    "iteris-rank8": {"rank": 8},
    "iteris-rank8-polish": {"rank": 8, "polish_steps": 300},
}
# Sizes that are left out for time.
UNMEASURED = {"iteris-polish": ("3",), "iteris-rank8-polish": ("2", "3")}
QUICK_METHODS = ("iteris", "average", "sum", "ties", "dare-linear", "regmean", "ssr")


Scores = Mapping[str, Mapping[str, float]]
"""column → seed → mean"""


def _key(
    numbers: Sequence[int],
    method: str,
    settings: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    preserve: float = 0.0,
) -> str:
    parts: list[Any] = [list(numbers), method, settings or {}, calibration or {}]
    if weights is not None or preserve:
        parts += [weights, preserve]
    return json.dumps(parts, sort_keys=True)


class Suite:
    """Scores by (set, method, settings), each measured once."""

    def __init__(self, world: World, cache: Path) -> None:
        self.world = world
        self.cache = cache
        self.known: dict[str, dict[str, Any]] = {}
        if cache.exists():
            for line in cache.read_text().splitlines():
                entry = json.loads(line)
                self.known[entry["key"]] = entry

    def measure(
        self,
        numbers: Sequence[int],
        method: str,
        settings: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
        weights: Sequence[float] | None = None,
        preserve: float = 0.0,
    ) -> dict[str, dict[str, float]]:
        """column → seed → mean. ``weights`` are the concepts'; ``preserve`` is that of a concept
        of prompts without triggers, on which the base is to stay as it is."""
        key = _key(numbers, method, settings, calibration, weights, preserve)
        if key not in self.known:
            started = time.perf_counter()
            concepts = self.world.merged_concepts(numbers, weights, preserve)
            scores, report = self._measure(numbers, method, settings, calibration or {}, concepts)
            entry = {
                "key": key,
                "scores": scores,
                "merge_seconds": report.seconds if report else 0.0,
                "residuals": [after for _, after in report.residuals()] if report else [],
                "seconds": time.perf_counter() - started,
            }
            self.known[key] = entry
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with self.cache.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(key, {c: round(fmean(v.values()), 3) for c, v in scores.items()},
                  f"{entry['seconds']:.0f} s", file=sys.stderr, flush=True)  # fmt: skip
        return self.known[key]["scores"]

    def entry(
        self, numbers: Sequence[int], method: str, settings: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """All that was kept of a measurement."""
        return self.known[_key(numbers, method, settings)]

    def _measure(
        self,
        numbers: Sequence[int],
        method: str,
        settings: Mapping[str, Any] | None,
        calibration: Mapping[str, Any],
        concepts: Sequence[Concept],
    ) -> tuple[dict[str, dict[str, float]], MergeReport | None]:
        world = self.world
        pictures = world.pictures(numbers)
        if method == "base":
            return world.score(pictures, world.draw(None, pictures)), None
        if method == "single":
            images: list[Image.Image] = []
            pictures = [p for p in pictures if len(p.concepts) == 1]
            for number in numbers:
                mine = [p for p in pictures if p.concepts == (f"sks{number}",)]
                images += world.draw(world.loras[f"sks{number}"], mine)
            return world.score(pictures, images), None
        result = merge_loras(
            world.host,
            concepts,
            method,
            settings=settings,
            calibration=Calibration(**{"templates": (*TEMPLATES, *PAIR_TEMPLATES), **calibration}),
        )
        return world.score(pictures, world.draw(result.lora, pictures)), result.report

    def tune(self, method: str) -> dict[str, Any]:
        """The setting with the best mean of image and text on the tuning pairs."""
        grid = GRIDS[method]
        if len(grid) == 1:
            return grid[0]

        def quality(settings: Mapping[str, Any]) -> float:
            scores = [self.measure(pair, method, settings) for pair in TUNING]
            return fmean(fmean(s[c].values()) for s in scores for c in ("image", "text"))

        return max(grid, key=quality)

    def total(
        self,
        sets: Sequence[tuple[int, ...]],
        method: str,
        settings: Mapping[str, Any] | None,
        calibration: Mapping[str, Any] | None = None,
        weigh: Callable[[Sequence[int]], Sequence[float]] | None = None,
        preserve: float = 0.0,
    ) -> dict[str, Stat]:
        """The row of a table, see :func:`row_of`."""
        return row_of(
            [
                self.measure(
                    n, method, settings, calibration, weigh(n) if weigh else None, preserve
                )
                for n in sets
            ]
        )

    def lead(
        self, sets: Sequence[tuple[int, ...]], other: str, settings: Mapping[str, Any]
    ) -> dict[str, Stat]:
        """column → how far the default is ahead of ``other``, set by set and seed by seed: all
        methods draw the same prompts from the same noise, so that differences vary less."""
        differences: list[Scores] = []
        for numbers in sets:
            ours = self.measure(numbers, "iteris")
            theirs = self.measure(numbers, other, settings)
            differences.append(
                {
                    column: {seed: value - theirs[column][seed] for seed, value in values.items()}
                    for column, values in ours.items()
                }
            )
        return row_of(differences)


def row_of(scores: Sequence[Scores]) -> dict[str, Stat]:
    """column → mean over sets, standard error over seeds; ``mean`` is of image and text."""
    row: dict[str, Stat] = {}
    for column in COLUMNS:
        pairs = [(value, int(seed)) for s in scores for seed, value in s.get(column, {}).items()]
        if pairs:
            row[column] = over_seeds([v for v, _ in pairs], [seed for _, seed in pairs])
    both = [
        ((image + s["text"][seed]) / 2, int(seed))
        for s in scores
        for seed, image in s["image"].items()
    ]
    return {"mean": over_seeds([v for v, _ in both], [seed for _, seed in both]), **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="")
    parser.add_argument("--sizes", default=",".join(SETS))
    parser.add_argument("--tune", action="store_true", help="search the grids again")
    arguments = parser.parse_args()
    suite = Suite(World(), CACHE)
    every = QUICK_METHODS if QUICK else GRIDS
    names = arguments.methods.split(",") if arguments.methods else list(every)
    chosen = {name: suite.tune(name) if arguments.tune else TUNED.get(name, {}) for name in names}
    data: dict[str, Any] = {
        "default": "iteris",
        "seeds": len(SEEDS),
        "settings": chosen,
        "sets": {},
        "leads": {},
    }
    for size in arguments.sizes.split(","):
        rows = {
            name: suite.total(SETS[size], name, chosen.get(name))
            for name in ("base", "single", *names)
        }
        if not QUICK and "iteris" in names:
            for name, settings in VARIANTS.items():
                if size in UNMEASURED.get(name, ()):
                    continue
                rows[name] = suite.total(SETS[size], "iteris", settings)
        data["sets"][size] = {
            name: {column: stat.to_dict() for column, stat in row.items()}
            for name, row in rows.items()
        }
        _show(size, rows)
        if "iteris" in names and len(names) > 1:
            second = max(set(names) - {"iteris"}, key=lambda name: rows[name]["mean"].mean)
            lead = suite.lead(SETS[size], second, chosen.get(second, {}))
            data["leads"][size] = {
                "over": second,
                **{column: stat.to_dict() for column, stat in lead.items()},
            }
            print(f"lead over {second}:", {c: str(stat) for c, stat in lead.items()})
    whole = not arguments.methods and arguments.sizes == ",".join(SETS)
    write(result_file("quality.json", whole=whole), data)


def _show(size: str, rows: Mapping[str, Mapping[str, Stat]]) -> None:
    print(f"\n{size} concepts")
    floor, ceiling = rows["base"]["image"].mean, rows["single"]["image"].mean
    for name, row in sorted(rows.items(), key=lambda r: -r[1]["mean"].mean):
        cells = "  ".join(f"{column} {stat}" for column, stat in row.items())
        kept = (row["image"].mean - floor) / (ceiling - floor)
        print(f"{name:18} {cells}  kept {kept:.2f}")


if __name__ == "__main__":
    main()
