"""How a merge of few prompts is pulled: today's rule, former ones and the two nearest rivals.

``python benchmarks/few_prompts.py`` writes ``benchmarks/results/few_prompts.json``, of the
toybox's own ten concepts, on which rules are chosen (those that are reported are
``reported_grid.py``'s). What stands there is not measured again, so that a run that was stopped
goes on; ``--again NAME`` measures a row anew. Every concept of a merge is drawn on two backgrounds;
all methods draw the same prompts from the same noise, and merge the same samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from outputs import QUICK, read, result_file, write
from protocol.toybox import ToyboxWorld
from protocol.world import Wanted

from iteris_core import Calibration, Lora, merge_loras
from iteris_core.score.statistics import over_compositions

FILE = result_file("few_prompts.json")
PICTURES = 1
"""The seed of the pictures"""
COLUMNS = ("image", "text", "judge")
POINTS = {"1 x 1": (1, 1), "2 x 2": (2, 2), "6 x 1": (6, 1), "12 x 4": (12, 4)}
"""Prompts x timesteps"""
SETS: Mapping[int, Sequence[tuple[int, ...]]] = {
    2: ((3, 5), (8, 9), (1, 4), (2, 6), (7, 10)),
    5: ((1, 4, 6, 8, 10), (2, 3, 5, 7, 9)),
    10: (tuple(range(1, 11)),),
}
CASES: Mapping[int, Mapping[str, Sequence[int]]] = {
    2: {"1 x 1": (0, 1), "2 x 2": (0,), "6 x 1": (0,)},
    5: dict.fromkeys(POINTS, (0,)),
    10: dict.fromkeys(POINTS, (0,)),
}
"""Concepts → point → seeds of the samples"""
BY_ONE = "by one"
"""The rule by the prompts of one LoRA, however many there are: of two it is today's."""
METHODS = ("iteris", BY_ONE, "former", "regmean++", "ssr")


def methods(concepts: int) -> list[str]:
    return [method for method in METHODS if method != BY_ONE or concepts > 2]


def settings(method: str, concepts: int, point: str) -> tuple[str, dict[str, Any]]:
    """The method's name, and its settings: the rivals' as they were found on these concepts."""
    prompts, _ = POINTS[point]
    if method == BY_ONE:
        return "iteris", {"ridge": min(1e-6 * (50 / prompts) ** 5, 1e-2), "pull": "size"}
    if method == "former":  # the ridge went with the square of the prompts, toward the mean
        return "iteris", {"ridge": 1e-6 * (50 / prompts) ** 2, "pull": "mean"}
    if method == "regmean++":
        return method, {"shrink": 0.9}
    if method == "ssr":
        return method, {"ridge": 1.0 if concepts >= 7 else 0.1}
    return method, {}


class Bench:
    """Scores of merges, each measured once."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, float]] = read(FILE).get("runs", {})
        self._world: ToyboxWorld | None = None

    @property
    def world(self) -> ToyboxWorld:
        if self._world is None:
            self._world = ToyboxWorld()
        return self._world

    def merged(
        self, method: str, numbers: Sequence[int], point: str, seed: int
    ) -> dict[str, float]:
        key = f"{method}, {point}, seed {seed}: {' '.join(map(str, numbers))}"
        if key not in self.runs:
            name, chosen = settings(method, len(numbers), point)
            prompts, timesteps = POINTS[point]
            calibration = Calibration(
                **self.world.calibration, samples=prompts, timesteps=timesteps, seed=seed
            )
            concepts = self.world.concepts(_names(numbers), 0)
            merge = merge_loras(
                self.world.host, concepts, name, settings=chosen, calibration=calibration
            )
            self._keep(key, [self._judged(merge.lora, _names(numbers))])
        return self.runs[key]

    def bound(self, name: str, numbers: Sequence[int]) -> dict[str, float]:
        """Of each LoRA alone (``single``), or of the base."""
        key = f"{name}: {' '.join(map(str, numbers))}"
        if key not in self.runs:
            subjects = _names(numbers)
            loras = [c.lora if name == "single" else None for c in self.world.concepts(subjects, 0)]
            one = [self._judged(lora, [s]) for s, lora in zip(subjects, loras, strict=True)]
            self._keep(key, one)
        return self.runs[key]

    def _judged(self, lora: Lora | None, subjects: Sequence[str]) -> dict[str, float]:
        wanted: list[Wanted] = [w for s in subjects for w in self.world.alone(s, PICTURES)]
        images = self.world.draw(lora, wanted)
        likeness = self.world.likeness(images, [w.shown[0] for w in wanted])
        return {
            **{judge: fmean(values) for judge, values in likeness.items()},
            "text": fmean(self.world.text_alignment(images, wanted)),
        }

    def _keep(self, key: str, scores: Sequence[Mapping[str, float]]) -> None:
        self.runs[key] = {column: fmean(s[column] for s in scores) for column in COLUMNS}
        write(FILE, {**read(FILE), "runs": self.runs})
        print(key, {c: round(v, 3) for c, v in self.runs[key].items()}, flush=True)


def figures(bench: Bench, concepts: int, point: str, seeds: Sequence[int]) -> dict[str, Any]:
    """``rows``: method → column → mean and standard error over merges; ``leads``: how far the
    default is ahead of the other, merge by merge; ``merges`` counts them."""
    merges = [(numbers, seed) for numbers in SETS[concepts] for seed in seeds]
    found = {m: [bench.merged(m, n, point, seed) for n, seed in merges] for m in methods(concepts)}
    bounds = {name: [bench.bound(name, n) for n, _ in merges] for name in ("single", "base")}
    ours = found["iteris"]
    leads = {
        name: [{c: mine[c] - its[c] for c in COLUMNS} for mine, its in zip(ours, some, strict=True)]
        for name, some in (found | bounds).items()
        if name != "iteris"
    }
    return {
        "merges": len(merges),
        "rows": {name: _stats(some) for name, some in (found | bounds).items()},
        "leads": {name: _stats(some) for name, some in leads.items()},
    }


def _names(numbers: Sequence[int]) -> list[str]:
    return [f"sks{number}" for number in numbers]


def _stats(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {c: over_compositions([s[c] for s in scores]).to_dict() for c in COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", default="", help="measure this row anew, such as iteris")
    again = parser.parse_args().again
    bench = Bench()
    if again:
        bench.runs = {k: v for k, v in bench.runs.items() if not k.startswith(f"{again}, ")}
    found: dict[str, Any] = {}
    for concepts, points in CASES.items():
        if QUICK and concepts > 2:
            continue
        found[str(concepts)] = {
            point: figures(bench, concepts, point, seeds) for point, seeds in points.items()
        }
    write(FILE, {"found": found, "runs": bench.runs})


if __name__ == "__main__":
    main()
