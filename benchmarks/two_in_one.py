"""Two and three concepts in one picture, from one merged LoRA: ``python benchmarks/two_in_one.py``.

On the reported concepts, each two neighbours of a set side by side and the ends as well,
:data:`SEEDS` pictures a pair. Writes ``results/two_in_one.json`` and goes on where it stopped
(``--seconds``, ``--sizes``).

``pair`` has one prompt that names both. ``halves`` has a prompt for each half, of two of its
concept, as regional prompts do: the same LoRA, and twice the time of a picture. ``three`` is the
same with three neighbours, half a picture wide each, denoised from windows of two
(``protocol/in_a_row.py``). ``right`` is the share of shapes, patterns and colours that the judge
reads rightly in each place, ``complete`` the share of pictures in which it reads all shapes.
``new words`` are pictures of each concept alone.

``composite`` is no merge: each LoRA denoises its own region.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from outputs import QUICK, result_file, rounded, write
from page_tables import unseen as table
from protocol.figures import Place, Row, figures, row
from protocol.plan import BASE, Plan, Unit, Variant
from protocol.runs import Entry, Runs
from protocol.toybox import ToyboxWorld
from protocol.world import Wanted
from worlds import reported

from iteris_core import Lora

SEEDS = 1 if QUICK else 8
KINDS = {"pair": 2, "halves": 2, "three": 3}
"""What is drawn, and how many neighbours it shows."""

ALONE = "new words"
COMPOSITE = "composite"
REGMEAN = "regmean++:contexts=0:generic=0"
"""It does better so (UNSEEN.md)."""

METHODS = ("iteris", REGMEAN, COMPOSITE, BASE)


class RowRuns(Runs):
    world: ToyboxWorld

    def measure(self, unit: Unit) -> Entry:
        """What is drawn of a merge of the unit's concepts, or of one of the two bounds."""
        if unit.method == COMPOSITE:
            concepts = self.world.concepts(unit.names, unit.trained)
            return self._rows({concept.name: concept.lora for concept in concepts})
        lora, entry = self._merged(unit)
        alone = self._of(lora, ALONE, unit)
        return {**entry, **self._rows(dict.fromkeys(unit.names, lora)), ALONE: alone}

    def _rows(self, loras: Mapping[str, Lora | None]) -> Entry:
        """Each region is denoised by the LoRA that is its concept's in ``loras``."""
        kinds = [kind for kind, count in KINDS.items() if count <= len(loras)]
        return {kind: self._row(kind, loras) for kind in kinds}

    def _row(self, kind: str, loras: Mapping[str, Lora | None]) -> list[object]:
        names, count, world = list(loras), KINDS[kind], self.world
        every = [one for seed in range(1, SEEDS + 1) for one in world.rows(names, count, seed)]
        found: list[object] = []
        for shown in dict.fromkeys(wanted.shown for wanted in every):
            order = [wanted for wanted in every if wanted.shown == shown]
            read = self._drawn(kind, [loras[name] for name in shown], order)
            label = " ".join(shown)
            found += [[label, {"right": right, "complete": float(all_)}] for right, all_ in read]
        return found

    def _drawn(
        self, kind: str, own: list[Lora | None], order: list[Wanted]
    ) -> list[tuple[float, bool]]:
        world = self.world
        if kind == "pair" and all(lora is own[0] for lora in own):
            return world.row_read(world.draw(own[0], order), order)
        named = [[one.prompt for one in order]] * len(own)
        regions = named if kind == "pair" else world.prompts_of_regions(order)
        images = world.draw_row(list(zip(own, regions, strict=True)), order)
        return world.row_read(images, order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after")
    parser.add_argument("--sizes", type=int, nargs="*", default=[2])
    parser.add_argument("--sets", type=int, default=3, help="of each size and training, at most")
    parser.add_argument("--replicates", type=int, default=1)
    asked = parser.parse_args()
    variants = [Variant.parsed(method) for method in METHODS]
    plan = Plan(reported(), variants, asked.sizes, asked.replicates, asked.sets)
    runs = RowRuns(plan.world, result_file("two_in_one_runs.jsonl"))
    whole = runs.run((unit for _, unit in plan.merges()), asked.seconds)
    rows: dict[str, dict[str, dict[Place, Row]]] = {}
    for variant, unit in plan.merges():
        if unit.key in runs.known:
            entry = runs.known[unit.key]
            kinds = [kind for kind in (*KINDS, ALONE) if kind in entry]
            of_size = rows.setdefault(str(len(unit.names)), {}).setdefault(variant.label, {})
            of_size[unit.replicate, unit.names] = row(entry, entry, entry, kinds)
    sizes = {size: figures(of, METHODS[0]) for size, of in rows.items()}
    data = rounded({"default": METHODS[0], "sizes": sizes})
    write(result_file("two_in_one.json"), data)
    for size in data["sizes"]:
        print("", *table(data, size), sep="\n")
    if not whole:
        print("\nstopped by --seconds")


if __name__ == "__main__":
    main()
