"""Two concepts in one picture, from one merged LoRA, on concepts that nothing was chosen on.

``python benchmarks/two_in_one.py`` writes ``benchmarks/results/two_in_one.json``, method by method,
and goes on where it stopped; ``--seconds`` stops it by itself, ``--sizes 2 10`` takes some numbers
of merged concepts and ``--methods`` some rows. The concepts are those of ``reported_concepts.py``;
each two neighbours of a set are drawn side by side, the first and the last as well, 20 pictures a
pair.

``pair`` is the share of shapes, patterns and colours that the judge reads rightly in the halves,
``both`` the share of pictures in which it reads both shapes. ``halves`` and ``halves, both`` are
the same where each half is denoised by a prompt of its own, of two of its concept, as regional
prompts do: the same LoRA, and twice the time of a picture. ``image``, ``judge`` and ``text`` are of
each concept alone, as in ``reported.py``. ``ahead`` is each of them less the default's, with the
standard error over pairs or concepts. ``composite`` is no merge: two LoRAs, each of which denoises
its half, which is what a block is drawn toward by the setting ``block_pairs``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from outputs import QUICK, read, result_file, write
from protocol.plan import OURS
from protocol.toybox import ToyboxWorld
from protocol.world import Wanted
from reported import CHOSEN, world

from iteris_core import Lora, merge_loras
from iteris_core.score.statistics import over_compositions

FILE = result_file("two_in_one.json")
SETS: Mapping[int, Sequence[Sequence[int]]] = {
    2: [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)],
    3: [(1, 4, 7), (2, 5, 8), (3, 6, 9)],
    5: [(1, 2, 3, 4, 5), (6, 7, 8, 9, 10)],
    7: [(1, 2, 4, 5, 7, 8, 10)],
    10: [tuple(range(1, 11))],
}
PICTURES = 2 if QUICK else 20
ALONE = range(1, 2 if QUICK else 5)
RIVALS = ("regmean++", "ssr", "regmean", "ties", "dare-ties", "task-arithmetic")
"""SSR-Merge, and those of others that are among the three best in such pictures in ``quality.json``
with two or with five concepts."""
POLISH = {"block_steps": 120}
POLISHED = f"{OURS}, polished"
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    OURS: (OURS, {}),
    POLISHED: (OURS, POLISH),
    f"{OURS}, no pairs": (OURS, {**POLISH, "block_pairs": 0.0}),
    **{rival: (rival, {}) for rival in RIVALS},
}
COMPOSITE = "composite"
ROWS = (*METHODS, COMPOSITE, "base")
SHARES, BY_HALVES = ("pair", "both"), ("halves", "halves, both")

Scores = dict[str, list[float]]
"""measure → a mean for each pair, or for each concept."""


class Bench:
    def __init__(self, of: ToyboxWorld) -> None:
        self.world = of

    def of_set(self, names: Sequence[str], method: str, settings: Mapping[str, Any]) -> Scores:
        size = len(names)
        given = settings if method == OURS else CHOSEN(method, size, "default")
        concepts = self.world.concepts(names, 0)
        calibration = {**self.world.calibration, "seed": 0}
        began = time.process_time()
        lora = merge_loras(
            self.world.host, concepts, method, settings=given, calibration=calibration
        ).lora
        seconds = time.process_time() - began
        return {
            **self._of_pairs(names, dict.fromkeys(names, lora)),
            **self._alone(names, lora),
            "seconds": [seconds],
        }

    def composite(self, names: Sequence[str]) -> Scores:
        return self._of_pairs(names, {c.name: c.lora for c in self.world.concepts(names, 0)})

    def base(self, names: Sequence[str]) -> Scores:
        return {**self._of_pairs(names, dict.fromkeys(names)), **self._alone(names, None)}

    def pairs(self, names: Sequence[str]) -> list[list[Wanted]]:
        """Pictures of each two neighbours; of two concepts both orders are one pair."""
        seeds = range(1, PICTURES // (2 if len(names) == 2 else 1) + 1)
        rings = [self.world.together(names, seed) for seed in seeds]
        if len(names) == 2:
            return [[wanted for ring in rings for wanted in ring]]
        return [list(some) for some in zip(*rings, strict=True)]

    def _of_pairs(self, names: Sequence[str], loras: Mapping[str, Lora | None]) -> Scores:
        """Each half is denoised by the LoRA that is its concept's in ``loras``."""
        found: Scores = {measure: [] for measure in (*SHARES, *BY_HALVES)}
        for pair in self.pairs(names):
            named: list[tuple[float, bool]] = []
            own: list[tuple[float, bool]] = []
            for shown in dict.fromkeys(wanted.shown for wanted in pair):  # of two in both orders
                order = [wanted for wanted in pair if wanted.shown == shown]
                left, right = (loras[name] for name in shown)
                named += self._read(left, right, order, *[[one.prompt for one in order]] * 2)
                own += self._read(left, right, order, *self.world.prompts_of_halves(order))
            for (share, both), some in ((SHARES, named), (BY_HALVES, own)):
                found[share].append(fmean(value for value, _ in some))
                found[both].append(fmean(value for _, value in some))
        return found

    def _read(
        self,
        left: Lora | None,
        right: Lora | None,
        wanted: Sequence[Wanted],
        first: Sequence[str],
        second: Sequence[str],
    ) -> list[tuple[float, bool]]:
        if left is right and first == second:
            images = self.world.draw(left, wanted)
        else:
            images = self.world.draw_halves((left, first), (right, second), wanted)
        return self.world.halves_read(images, wanted)

    def _alone(self, names: Sequence[str], lora: Lora | None) -> Scores:
        found: Scores = {"image": [], "judge": [], "text": []}
        for name in names:
            wanted = [w for seed in ALONE for w in self.world.alone(name, seed)]
            images = self.world.draw(lora, wanted)
            judged = self.world.likeness(images, [name] * len(images))
            for measure, values in judged.items():
                found[measure].append(fmean(values))
            found["text"].append(fmean(self.world.text_alignment(images, wanted)))
        return found


def joined(of_sets: Sequence[Scores]) -> Scores:
    return {measure: [v for of in of_sets for v in of[measure]] for measure in of_sets[0]}


def summary(found: Mapping[str, Scores]) -> dict[str, Any]:
    return {
        name: {
            **{measure: fmean(values) for measure, values in scores.items()},
            "ahead": {
                measure: _difference(scores[measure], found[OURS][measure])
                for measure in scores
                if measure != "seconds" and measure in found.get(OURS, {})
            },
        }
        for name, scores in found.items()
    }


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None]:
    return over_compositions([a - b for a, b in zip(ours, theirs, strict=True)]).to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SETS), choices=SETS)
    parser.add_argument("--methods", nargs="*", default=list(ROWS), choices=ROWS)
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    bench = Bench(world())
    for size in asked.sizes:
        sets = [[f"sks{number}" for number in numbers] for numbers in SETS[size]]
        for name in asked.methods:
            runs = read(FILE).get(str(size), {}).get("runs", {})
            if "halves" in runs.get(name, {}) or time.monotonic() > until:
                continue
            if name in METHODS:
                found = joined([bench.of_set(names, *METHODS[name]) for names in sets])
            elif name == COMPOSITE:
                found = joined([bench.composite(names) for names in sets])
            else:
                found = joined([bench.base(names) for names in sets])
            data = read(FILE)  # another process may have written meanwhile
            runs = {**data.get(str(size), {}).get("runs", {}), name: found}
            write(FILE, {**data, str(size): {"methods": summary(runs), "runs": runs}})
            print(size, name, "measured", flush=True)


if __name__ == "__main__":
    main()
