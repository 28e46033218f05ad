"""Merges on prompts that no calibration row had: ``python benchmarks/unseen.py --world toybox``.

Writes ``benchmarks/results/unseen_WORLD.json`` and prints its tables: for each number of concepts
the means over sets, and the first method's difference to each other one, paired by set, with its
95 % interval and ``first``, ``level`` or ``behind``. What is measured is kept line by line beside
it, so that a run that was stopped goes on; ``--tag NAME`` keeps the merges of another state of the
code apart, while the LoRAs alone and the base are shared.

A method is ``NAME[@searched][:FIELD=VALUE]…`` with fields of its settings or of the calibration:
``iteris``, ``iteris:ridge=1e-4``, ``iteris:samples=20``, ``ssr@searched``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from markdown_tables import lines, short
from outputs import RESULTS, result_file, write
from protocol.plan import Settings
from protocol.settings import Chosen
from protocol.unseen import Plan, UnseenRuns, Variant, figures, rows_of_size
from protocol.world import UnseenWorld
from quality import TUNED

METHODS = (
    "iteris,regmean++,regmean++@searched,chain-of-merges,chain-of-merges@searched,"
    "ssr,ssr@searched,average,sum"
)
SHOWN = (
    ("seen", "likeness"),
    ("seen", "judge"),
    ("seen", "scene"),
    ("new words", "likeness"),
    ("new words", "likeness kept"),
    ("new words", "judge"),
    ("new words", "scene"),
    ("no trigger", "likeness"),
    ("no trigger", "pixels"),
    ("spread", "share"),
    ("spread", "share of pixels"),
)
"""The columns that are printed; the file has more."""


def _toybox() -> UnseenWorld:
    from protocol.toybox import ToyboxWorld

    return ToyboxWorld()


def _reported() -> UnseenWorld:
    from reported import world

    return world()


def _emoji() -> UnseenWorld:
    from protocol.emoji import EmojiWorld

    return EmojiWorld()


WORLDS: Mapping[str, tuple[Callable[[], UnseenWorld], str]] = {
    "toybox": (_toybox, "reported"),
    "reported": (_reported, "reported"),
    "emoji": (_emoji, "emoji"),
}
"""World → how it is loaded, and whose search has settings for it"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=WORLDS, default="toybox")
    parser.add_argument("--sizes", default="2,3,5", help="how many concepts are merged")
    parser.add_argument("--methods", default=METHODS, help="the first is held against the others")
    parser.add_argument("--replicates", type=int, default=1)
    parser.add_argument("--sets", type=int, help="of each size and replicate, at most")
    parser.add_argument("--tag", default="", help="of the file, and of the merges that it keeps")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing after these"
    )
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    load, searched = WORLDS[asked.world]
    world = load()
    plan = Plan(
        world,
        [Variant.parsed(label) for label in asked.methods.split(",")],
        [int(size) for size in asked.sizes.split(",")],
        asked.replicates,
        settings_of(searched),
        asked.sets,
    )
    name = f"unseen_{asked.world}"
    alone = UnseenRuns(world, result_file(f"{name}_alone.jsonl"))
    name += f"_{asked.tag}" if asked.tag else ""
    merged = UnseenRuns(world, result_file(f"{name}_runs.jsonl"))
    whole = alone.run(plan.references(), until - time.monotonic())
    whole = whole and merged.run((t for _, t in plan.merges()), until - time.monotonic())
    data = results(plan, alone, merged)
    write(result_file(f"{name}.json"), data)
    print("\n".join(tables(data)))
    if not whole:
        print("\nstopped by --seconds")


def settings_of(search: str) -> Settings:
    """What a search found on that world, for methods marked ``@searched``."""
    return Chosen(RESULTS / f"{search}_settings.json", TUNED)


def results(plan: Plan, alone: UnseenRuns, merged: UnseenRuns) -> dict[str, Any]:
    ours = plan.variants[0].label
    return {
        "default": ours,
        "half": plan.world.half,
        "replicates": plan.replicates,
        "settings": {
            v.label: {
                str(size): dict(v.trial(("",) * size, 0, 0, plan.searched).settings)
                for size in plan.sizes
            }
            for v in plan.variants
        },
        "sizes": {
            str(size): figures(rows_of_size(plan, size, alone, merged), ours) for size in plan.sizes
        },
    }


def tables(data: Mapping[str, Any]) -> Iterator[str]:
    """Of each size the means, and the differences to the first method."""
    for size, found in data["sizes"].items():
        head = [f"{size} concepts", "n", *(f"{kind}: {name}" for kind, name in SHOWN)]
        yield ""
        yield from lines(head, (_means(*one) for one in found["rows"].items()), len(head) - 1)
        head[0] = f"{data['default']} less …"
        yield ""
        yield from lines(head, (_paired(*one) for one in found["against"].items()), len(head) - 1)


def _means(label: str, of: Mapping[str, Any]) -> list[str]:
    cells = [of.get(kind, {}).get(name) for kind, name in SHOWN]
    return [label, _n(cells), *(short(f"{c['mean']:.3f}") if c else "" for c in cells)]


def _paired(label: str, of: Mapping[str, Any]) -> list[str]:
    cells = [of.get(kind, {}).get(name) for kind, name in SHOWN]
    return [label, _n(cells), *(_difference(c) if c else "" for c in cells)]


def _n(cells: list[Any]) -> str:
    return str(max(c["n"] for c in cells if c))


def _difference(found: Mapping[str, Any]) -> str:
    if found["interval"] is None:
        return short(f"{found['mean']:+.3f}")
    half_width = found["interval"][1] - found["mean"]
    return short(f"{found['mean']:+.3f} ± {half_width:.3f} {found['verdict']}")


if __name__ == "__main__":
    main()
