"""Two concepts in one picture, and three, from one merged LoRA, on concepts that nothing was
chosen on.

``python benchmarks/two_in_one.py`` writes ``benchmarks/results/two_in_one.json``, method by method,
and goes on where it stopped; ``--seconds`` stops it by itself, ``--sizes 2 10`` takes some numbers
of merged concepts and ``--methods`` some rows. The concepts are those of ``reported_concepts.py``;
each two neighbours of a set are drawn side by side, the first and the last as well, 20 pictures a
pair. ``--world emoji`` has the emoji's subjects, into ``two_in_one_emoji.json``.

``pair`` is the share of shapes, patterns and colours that the judge reads rightly in the halves
(of emoji, of subjects that are found in theirs), ``both`` the share of pictures in which it reads
both shapes. ``halves`` and ``halves, both`` are the same where each half is denoised by a prompt of
its own, of two of its concept, as regional prompts do: the same LoRA, and twice the time of a
picture. ``three`` and ``three, all`` are of three neighbours in a row, half a picture wide each,
denoised in the same way from windows of two (``protocol/in_a_row.py``); as many pictures a row.
``image``, ``judge`` and ``text`` are of each concept alone.
``ahead`` is each of them less the default's, with the standard error over pairs or concepts.
``composite`` is no merge: LoRAs, each of which denoises its region, which is what a block is drawn
toward by the setting ``block_pairs``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from outputs import QUICK, read, result_file, write
from protocol.settings import Chosen
from protocol.world import RowWorld, Wanted
from worlds import emoji, reported, settings_of

from iteris_core import Lora, merge_loras
from iteris_core.score.statistics import over_compositions

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
POLISHED = f"{OURS}, polished"
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    OURS: (OURS, {}),
    POLISHED: (OURS, POLISH),
    f"{OURS}, no pairs": (OURS, {**POLISH, "block_pairs": 0.0}),
    **{rival: (rival, {}) for rival in RIVALS},
}
COMPOSITE = "composite"
ROWS = (*METHODS, COMPOSITE, "base")


@dataclass(frozen=True)
class InARow:
    """Pictures of ``count`` neighbours, from one prompt that names all (``named``) or by regions,
    and what the share of them in which all are there is called."""

    complete: str
    count: int
    named: bool = False


ALONE_TOO = "alone"
KINDS: Mapping[str, InARow] = {
    "pair": InARow("both", 2, named=True),
    "halves": InARow("halves, both", 2),
    "three": InARow("three, all", 3),
}
"""What is drawn, by its measure; ``ALONE_TOO`` are pictures of each concept by itself."""

Scores = dict[str, list[float]]
"""measure → a mean for each pair or triple, or for each concept."""


@dataclass(frozen=True)
class Case:
    """A world, the settings that its rivals have, where the table goes, and what is measured."""

    world: Callable[[], Any]
    chosen: Chosen
    file: str
    kinds: Sequence[str]


WORLDS = {
    "toybox": Case(reported, settings_of("reported"), "two_in_one.json", (*KINDS, ALONE_TOO)),
    "emoji": Case(emoji, settings_of("emoji"), "two_in_one_emoji.json", ("pair", "halves")),
}


class Bench:
    def __init__(self, world: RowWorld, chosen: Chosen) -> None:
        self.world, self._chosen = world, chosen

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
        given = settings if method == OURS else self._chosen(method, len(names), "default")
        return merge_loras(
            self.world.host,
            self.world.concepts(names, 0),
            method,
            settings=given,
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
        kind = KINDS[share]
        found: Scores = {share: [], kind.complete: []}
        for row in self.rows(list(loras), kind.count):
            values: list[tuple[float, bool]] = []
            for shown in dict.fromkeys(wanted.shown for wanted in row):
                order = [wanted for wanted in row if wanted.shown == shown]
                own = [loras[name] for name in shown]
                if kind.named and all(lora is own[0] for lora in own):
                    images = self.world.draw(own[0], order)
                else:
                    named = [[one.prompt for one in order]] * kind.count
                    regions = named if kind.named else self.world.prompts_of_regions(order)
                    images = self.world.draw_row(list(zip(own, regions, strict=True)), order)
                values += self.world.row_read(images, order)
            found[share].append(fmean(value for value, _ in values))
            found[kind.complete].append(fmean(value for _, value in values))
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


def missing(kinds: Sequence[str], row: str, size: int, run: Mapping[str, Any]) -> list[str]:
    """Of ``kinds`` what is not in ``run`` yet and can be measured of such a row."""
    possible = [k for k in kinds if k in KINDS and KINDS[k].count <= size and k not in run]
    alone = ALONE_TOO in kinds and row != COMPOSITE and "image" not in run
    return possible + [ALONE_TOO] * alone


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
    parser.add_argument("--world", default="toybox", choices=WORLDS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SETS), choices=SETS)
    parser.add_argument("--methods", nargs="*", default=list(ROWS), choices=ROWS)
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    case = WORLDS[asked.world]
    file = result_file(case.file)
    world = case.world()
    bench = Bench(world, case.chosen)
    for size in asked.sizes:
        sets = [[world.subjects[number - 1] for number in numbers] for numbers in SETS[size]]
        for name in asked.methods:
            run = read(file).get(str(size), {}).get("runs", {}).get(name, {})
            kinds = missing(case.kinds, name, size, run)
            if not kinds or time.monotonic() > until:
                continue
            found = joined([bench.measured(name, names, kinds) for names in sets])
            data = read(file)  # another process may have written meanwhile
            runs = data.get(str(size), {}).get("runs", {})
            runs = {**runs, name: {**run, **found}}
            write(file, {**data, str(size): {"methods": summary(runs), "runs": runs}})
            print(size, name, *kinds, "measured", flush=True)


if __name__ == "__main__":
    main()
