"""How large a change may be, and what steps add: ``python benchmarks/bounds.py [--world toybox]``.

Settings are chosen here, on sets that are never reported: the toybox's own ten, three of them in
LoRAs with small changes (``gentle``), and the first things of the emoji, on a model that gates. A
figure is what a merge keeps on strict rows (:mod:`protocol.uses_of_rows`), by use; ``own`` is what
the merge's report says of itself, the mean over strengths and phantoms; ``norm`` as in
``conditions.py``. Writes ``results/bounds_WORLD.json``; goes on where it stopped (``--seconds``).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from statistics import fmean
from typing import Any

import emoji
import rivals  # noqa: F401 (registers them)
from conditions import norm
from outputs import asked, once, result_file
from protocol import emoji as emoji_prompts
from protocol import toybox as toybox_prompts
from protocol.held_out import result_of
from protocol.plan import Unit, sets_of
from protocol.uses_of_rows import Errors
from protocol.world import World
from worlds import WORLDS

from iteris_core import Concept

WORLD_NAMES = ("toybox", "gentle", "emoji")
METHODS = ("iteris", *(f"iteris:bound={bound}" for bound in (1, 2, 0)))


def sets(name: str, world: World, size: int) -> Iterator[tuple[str, ...]]:
    if name == "emoji":
        chosen = [one for one in emoji.subjects() if one not in world.subjects]
        yield tuple(chosen[:size])
    else:
        yield from sets_of(sorted(world.subjects), size, 0)[
            : 2 if size <= 5 and name == "toybox" else 1
        ]


def measured(
    world: World, concepts: Sequence[Concept], label: str, errors: Callable[[], Errors]
) -> dict[str, Any]:
    how, began = Unit.parsed(label), time.process_time()
    options = {"settings": how.settings, "calibration": how.calibration}
    made = result_of(world, concepts, how.method, **options)
    seconds = time.process_time() - began
    together = math.hypot(*(norm(c.lora) for c in concepts if c.lora is not None))
    own = {use: fmean(shares) for use, shares in made.report.kept.items()}
    found = errors().kept(made.lora.sites)
    return {**found, "own": own, "norm": norm(made.lora) / together, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=WORLD_NAMES, default="toybox")
    parser.add_argument("--sizes", default="2,5")
    parser.add_argument("--methods", default=",".join(METHODS))
    given = asked(parser)
    world: Any = WORLDS[given.world]()
    if given.world == "emoji":
        templates = [f"a {{}} on a {background} background" for background in emoji_prompts.NEW]
    else:
        templates = [toybox_prompts.compose(("{}",), b) for b in toybox_prompts.NEW]
    path = result_file(f"bounds_{given.world}.json")
    for size in map(int, given.sizes.split(",")):
        for names in sets(given.world, world, size):
            rest = next(name for name in sorted(world.subjects) if name not in names)
            concepts, other = world.concepts(names, 0), world.concepts([rest], 0)[0].lora
            made = partial(Errors, world, concepts, other.sites, templates, phantom=True)
            errors = cache(made)
            for label in given.methods.split(","):
                key = json.dumps([label, *names])
                once(path, key, given.until, partial(measured, world, concepts, label, errors))


if __name__ == "__main__":
    main()
