"""Two concepts in one picture, and three, from one merged LoRA, on concepts that nothing was
chosen on.

``python benchmarks/two_in_one.py`` writes ``benchmarks/results/two_in_one.json``, method by method,
and goes on where it stopped; ``--seconds`` stops it by itself, ``--sizes 2 10`` takes some numbers
of merged concepts and ``--methods`` some rows. The concepts are those of ``reported_concepts.py``;
each two neighbours of a set are drawn side by side, the first and the last as well, 20 pictures a
pair.

``pair`` is the share of shapes, patterns and colours that the judge reads rightly in the halves,
``both`` the share of pictures in which it reads both shapes. ``halves`` and ``halves, both`` are
the same where each half is denoised by a prompt of its own, of two of its concept, as regional
prompts do: the same LoRA, and twice the time of a picture. ``three`` and ``three, all`` are of
three neighbours in a row, half a picture wide each, denoised in the same way from windows of two
(``protocol/in_a_row.py``); as many pictures a row. ``image``, ``judge`` and ``text`` are of each
concept alone. ``ahead`` is each of them less the default's, with the standard error over pairs or
concepts. ``composite`` is no merge: LoRAs, each of which denoises its region, which is what a block
is drawn toward by the setting ``block_pairs``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from outputs import QUICK, read, result_file, write
from protocol.toybox import ToyboxWorld
from protocol.world import Wanted
from search_settings import searched
from worlds import reported

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
OURS = "iteris"
PICTURES = 2 if QUICK else 20
ALONE = range(1, 2 if QUICK else 5)
RIVALS = ("regmean++", "ssr", "regmean", "ties", "dare-ties", "task-arithmetic")
"""SSR-Merge, and those that were among the three best in such pictures of the toybox's own ten."""
POLISH = {"block_steps": 120}
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    OURS: (OURS, {}),
    f"{OURS}, polished": (OURS, POLISH),
    f"{OURS}, no pairs": (OURS, {**POLISH, "block_pairs": 0.0}),
    **{rival: (rival, {}) for rival in RIVALS},
}
COMPOSITE = "composite"
ROWS = (*METHODS, COMPOSITE, "base")


ALONE_TOO = "alone"
KINDS = {"pair": ("both", 2), "halves": ("halves, both", 2), "three": ("three, all", 3)}
"""What is drawn, by its measure: what the share of pictures in which all are there is called, and
how many neighbours each shows. A pair has one prompt that names both, others one for each region;
``ALONE_TOO`` are pictures of each concept by itself."""

Scores = dict[str, list[float]]
"""measure → a mean for each pair or triple, or for each concept."""


class Bench:
    def __init__(self, world: ToyboxWorld) -> None:
        self.world = world

    def measured(self, row: str, names: Sequence[str], kinds: Sequence[str]) -> Scores:
        """What ``kinds``, of those that are :func:`missing`, say of a merge of ``names``, or of one
        of the two bounds."""
        if row == COMPOSITE:
            own: dict[str, Lora | None] = {c.name: c.lora for c in self.world.concepts(names, 0)}
            return self._scores(own, kinds)
        if row not in METHODS:
            return self._scores(dict.fromkeys(names), kinds)
        began = time.process_time()
        lora = self._merged(names, *METHODS[row])
        seconds = time.process_time() - began
        return {**self._scores(dict.fromkeys(names, lora), kinds), "seconds": [seconds]}

    def _merged(self, names: Sequence[str], method: str, settings: Mapping[str, Any]) -> Lora:
        return merge_loras(
            self.world.host,
            self.world.concepts(names, 0),
            method,
            settings=settings if method == OURS else searched(method, len(names)),
            calibration={**self.world.calibration, "seed": 0},
        ).lora

    def _scores(self, loras: Mapping[str, Lora | None], kinds: Sequence[str]) -> Scores:
        """Each region is denoised by the LoRA that is its concept's in ``loras``."""
        found: Scores = {}
        for kind in kinds:
            found |= self._alone(loras) if kind == ALONE_TOO else self._in_a_row(kind, loras)
        return found

    def rows(self, names: Sequence[str], count: int) -> list[list[Wanted]]:
        """Pictures of ``count`` neighbours, so that each two are in one row; of as many concepts
        all orders are one."""
        orders = count if len(names) == count else 1
        seeds = range(1, -(-PICTURES // orders) + 1)
        rings = [self.world.rows(names, count, seed) for seed in seeds]
        if orders > 1:
            return [[wanted for ring in rings for wanted in ring][:PICTURES]]
        return [list(some) for some in zip(*rings, strict=True)][:: count - 1]

    def _in_a_row(self, share: str, loras: Mapping[str, Lora | None]) -> Scores:
        complete, count = KINDS[share]
        found: Scores = {share: [], complete: []}
        for row in self.rows(list(loras), count):
            values: list[tuple[float, bool]] = []
            for shown in dict.fromkeys(wanted.shown for wanted in row):
                order = [wanted for wanted in row if wanted.shown == shown]
                own = [loras[name] for name in shown]
                if share == "pair" and all(lora is own[0] for lora in own):
                    images = self.world.draw(own[0], order)
                else:
                    named = [[one.prompt for one in order]] * count
                    regions = named if share == "pair" else self.world.prompts_of_regions(order)
                    images = self.world.draw_row(list(zip(own, regions, strict=True)), order)
                values += self.world.row_read(images, order)
            found[share].append(fmean(value for value, _ in values))
            found[complete].append(fmean(value for _, value in values))
        return found

    def _alone(self, loras: Mapping[str, Lora | None]) -> Scores:
        found: Scores = {"image": [], "judge": [], "text": []}
        for name, lora in loras.items():
            wanted = [w for seed in ALONE for w in self.world.alone(name, seed)]
            images = self.world.draw(lora, wanted)
            judged = self.world.likeness(images, [name] * len(images))
            for measure, values in judged.items():
                found[measure].append(fmean(values))
            found["text"].append(fmean(self.world.text_alignment(images, wanted)))
        return found


def missing(row: str, size: int, run: Mapping[str, Any]) -> list[str]:
    """What is not in ``run`` yet and can be measured of such a row."""
    possible = [kind for kind, (_, of) in KINDS.items() if of <= size and kind not in run]
    alone = row != COMPOSITE and "image" not in run
    return possible + [ALONE_TOO] * alone


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
    world = reported()
    bench = Bench(world)
    for size in asked.sizes:
        sets = [[world.subjects[number - 1] for number in numbers] for numbers in SETS[size]]
        for name in asked.methods:
            run = read(FILE).get(str(size), {}).get("runs", {}).get(name, {})
            kinds = missing(name, size, run)
            if not kinds or time.monotonic() > until:
                continue
            of_sets = [bench.measured(name, names, kinds) for names in sets]
            found = {measure: [v for of in of_sets for v in of[measure]] for measure in of_sets[0]}
            data = read(FILE)  # another process may have written meanwhile
            runs = data.get(str(size), {}).get("runs", {})
            runs = {**runs, name: {**run, **found}}
            write(FILE, {**data, str(size): {"methods": summary(runs), "runs": runs}})
            print(size, name, *kinds, "measured", flush=True)


if __name__ == "__main__":
    main()
