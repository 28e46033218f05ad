"""Polish block by block, on concepts that nothing was chosen on: alike ones, and ten at a low rank.

``python benchmarks/block_polish.py`` writes ``benchmarks/results/block_polish.json``, case by case,
and goes on where it stopped; ``--seconds`` stops it by itself. Per case the means of ``image``,
``judge`` and ``text`` over all pictures of its sets, the same less the default's on the same
pictures with the standard error over concepts, the share of likeness above the base that is
``kept`` of each LoRA alone, and the seconds of this process's processor time that merges took.

``alike`` are five circles and five squares (``alike_concepts.py``), of each class the first and the
last three or all five; ``ten`` are the concepts of ``reported_concepts.py``; in pairs and in fives
they have the preset ``best``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from outputs import QUICK, read, result_file, write
from protocol.toybox import ToyboxWorld

from iteris_core import Lora, merge_loras
from iteris_core.score.statistics import over_compositions

ROOT = Path(__file__).parent
FILE = result_file("block_polish.json")
SEEDS = 2 if QUICK else 8
STEPS = 120
MORE = 300
"""Of alike concepts: with as many, three stars and three pairs of the toybox's own are as good as
with each LoRA alone, and with ``STEPS`` not quite."""


@dataclass(frozen=True)
class Case:
    """``methods`` are what a merge is given, by the name that tables have; the first one is what
    the others are held to. Of each concept there are two pictures for each of ``seeds``."""

    world: Path
    sets: Sequence[Sequence[int]]
    methods: Mapping[str, Mapping[str, Any]]
    seeds: int = SEEDS


def blocks(loras: int, steps: int = STEPS) -> Mapping[str, Any]:
    """``steps`` in all, without pictures of two, which ``two_in_one.py`` measures."""
    return {"block_steps": round(steps * 2 / loras), "block_pairs": 0.0}


def polished(loras: int, *counts: int) -> Mapping[str, Mapping[str, Any]]:
    with_steps = {f"{n} steps a block": {"settings": blocks(loras, n)} for n in counts}
    return {"default": {}, **with_steps}


def alike(*sets: Sequence[int]) -> Case:
    return Case(ROOT / "alike", sets, polished(len(sets[0]), STEPS, MORE), SEEDS * 3 // 2)


PRESETS = {"default": {}, "best": {"preset": "best"}}
CASES: Mapping[str, Case] = {
    "ten at rank 8": Case(
        ROOT / "reported",
        [tuple(range(1, 11))],
        {
            "rank 8": {"settings": {"rank": 8}},
            f"rank 8, {STEPS} steps a block": {"settings": {"rank": 8, **blocks(10)}},
        },
    ),
    "ten": Case(ROOT / "reported", [tuple(range(1, 11))], polished(10, STEPS)),
    "three alike": alike((1, 2, 3), (3, 4, 5), (6, 7, 8), (8, 9, 10)),
    "five alike": alike((1, 2, 3, 4, 5), (6, 7, 8, 9, 10)),
    "pairs, presets": Case(ROOT / "reported", [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)], PRESETS),
    "fives, presets": Case(ROOT / "reported", [(1, 2, 3, 4, 5), (6, 7, 8, 9, 10)], PRESETS),
}


class Bench:
    def __init__(self, root: Path, seeds: int) -> None:
        self.world, self._seeds = ToyboxWorld(root), range(1, seeds + 1)

    def scores(self, name: str, lora: Lora | None) -> dict[str, list[float]]:
        """Of one concept's pictures, two for each seed."""
        wanted = [w for seed in self._seeds for w in self.world.alone(name, seed)]
        images = self.world.draw(lora, wanted)
        judged = self.world.likeness(images, [name] * len(images))
        return {
            **{judge: list(values) for judge, values in judged.items()},
            "text": list(self.world.text_alignment(images, wanted)),
        }

    def of_sets(self, sets: Sequence[Sequence[str]], given: Mapping[str, Any]) -> Any:
        """Every concept of every set, and the seconds that the merges took."""
        found: list[dict[str, list[float]]] = []
        seconds: list[float] = []
        for names in sets:
            began = time.process_time()
            lora = merge_loras(
                self.world.host,
                self.world.concepts(names, 0),
                calibration={**self.world.calibration, "seed": 0},
                **given,
            ).lora
            seconds.append(time.process_time() - began)
            found += [self.scores(name, lora) for name in names]
        return found, seconds


def measured(case: Case) -> dict[str, Any]:
    bench = Bench(case.world, case.seeds)
    sets = [[f"sks{number}" for number in numbers] for numbers in case.sets]
    names = [name for some in sets for name in some]
    loras = {c.name: c.lora for c in bench.world.concepts(sorted(set(names)), 0)}
    alone = {name: bench.scores(name, lora) for name, lora in loras.items()}
    base = {name: bench.scores(name, None) for name in loras}
    single, plain = ([of[name] for name in names] for of in (alone, base))
    methods = {name: bench.of_sets(sets, given) for name, given in case.methods.items()}
    first, _ = next(iter(methods.values()))
    low, high = _means(plain)["image"], _means(single)["image"]
    return {
        "sets": [list(numbers) for numbers in case.sets],
        "pictures": sum(len(of["image"]) for of in single),
        "single": _means(single),
        "base": _means(plain),
        "methods": {
            name: {
                **_means(found),
                "kept": (_means(found)["image"] - low) / (high - low),
                "less the first": {m: _difference(found, first, m) for m in found[0]},
                "seconds": fmean(seconds),
            }
            for name, (found, seconds) in methods.items()
        },
    }


def _means(found: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    return {measure: fmean(fmean(of[measure]) for of in found) for measure in found[0]}


def _difference(
    ours: Sequence[Mapping[str, Sequence[float]]],
    theirs: Sequence[Mapping[str, Sequence[float]]],
    measure: str,
) -> dict[str, float | None]:
    """Over the concepts of all sets."""
    values = [fmean(a[measure]) - fmean(b[measure]) for a, b in zip(ours, theirs, strict=True)]
    return over_compositions(values).to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after")
    parser.add_argument("--again", nargs="*", default=(), choices=CASES)
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    for name, case in CASES.items():
        data = read(FILE)
        if (name in data and name not in asked.again) or time.monotonic() > until:
            continue
        write(FILE, {**data, name: measured(case)})
        print(name, "measured", flush=True)


if __name__ == "__main__":
    main()
