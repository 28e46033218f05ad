"""Merged LoRAs under conditions of use: ``python benchmarks/conditions.py [--world toybox]``.

People load a LoRA at other strengths, beside another one, with another sampler, on a rounded base.
Each merge is drawn on new words under each of :data:`uses.CONDITIONS`, and so are each LoRA alone
and the base with the same other LoRA beside it;
``--further``: under :data:`uses.FURTHER` too. ``norm`` is the merge's norm as a multiple of what
the LoRAs have together, (Σ ‖ΔW_i‖²)^½. Writes ``results/conditions_WORLD.json``. It goes on where
it stopped (``--seconds``), and merges again for a use that a run lacks.

On photographs the comparison was named here before it was run: ``--world photos --trainings 3``,
the defaults of IterIS with those of Chain of Merges in each use, by likeness and by ``judge``, the
share of pictures that are recognised.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import rivals  # noqa: F401 (registers them)
import styles
from outputs import asked, read, result_file, rounded, write
from protocol.held_out import merged as merge
from protocol.plan import BASE, SINGLE, Unit, sets_of
from protocol.toybox import ToyboxWorld
from uses import CONDITIONS, FURTHER, Beside, Use
from worlds import WORLDS

from iteris_core import Concept, Lora

SETS = {
    "toybox": {2: 3, 5: 1},
    "reported": {2: 2, 3: 2, 5: 1, 7: 1, 10: 1},
    "photos": {5: 2},
}
"""World → how many LoRAs → sets of each training; of more than five LoRAs of the first alone."""
METHODS = ("iteris", "chain-of-merges:conditions=0", "average", BASE)


def figures(world: ToyboxWorld, lora: Lora, names: Sequence[str], use: Use) -> dict[str, float]:
    wanted = world.prompted("new words", names, 1)
    pictures = world.read(use.draw(world, lora, wanted), wanted)
    return {name: fmean(p[name] for p in pictures) for name in pictures[0]}


def merged(
    world: Any, concepts: Sequence[Concept], label: str, seed: int
) -> tuple[Lora, dict[str, float]]:
    """The merge, its ``norm`` and ``seconds``."""
    how = Unit.parsed(label)
    calibration = {"seed": seed, **how.calibration}
    began = time.process_time()
    lora = merge(world, concepts, how.method, settings=how.settings, calibration=calibration)
    seconds = time.process_time() - began
    together = math.hypot(*(norm(c.lora) for c in concepts if c.lora is not None))
    return lora, {"norm": norm(lora) / together, "seconds": seconds}


def norm(lora: Lora) -> float:
    return math.sqrt(sum(change.squared_norm() for change in lora.sites.values()))


def sets(world: str, subjects: Sequence[str], trained: int) -> Iterator[tuple[str, ...]]:
    for size, count in SETS[world].items():
        yield from sets_of(subjects, size, trained)[: count if size <= 5 or not trained else 0]


def measure(
    world: ToyboxWorld,
    label: str,
    names: Sequence[str],
    trained: int,
    more: Beside,
    uses: Mapping[str, Use],
) -> dict[str, Any]:
    """Use → figures of a merge, of the one LoRA alone, or of the base with what is beside."""
    if label == BASE:
        lora, found = Lora({}), dict[str, Any]()
    elif label == SINGLE:
        lora, found = world.concepts(names, trained)[0].lora or Lora({}), dict[str, Any]()
    else:
        lora, found = merged(world, world.concepts(names, trained), label, trained)
    return {**found, **{n: figures(world, u.of(lora, more), names, u) for n, u in uses.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=sorted(SETS), default="toybox")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--trainings", type=int, default=1)
    parser.add_argument("--further", action="store_true", help="of the first training")
    given = asked(parser)
    world: Any = WORLDS[given.world]()
    # None was trained for the base of photographs.
    style = next(iter(styles.styles().values())).lora if given.world != "photos" else None
    style = world.host.read_lora(style) if style else Lora({})
    path = result_file(f"conditions_{given.world}.json")
    for trained in range(given.trainings):
        uses = {**CONDITIONS, **(FURTHER if given.further and not trained else {})}
        for names in sets(given.world, sorted(world.subjects), trained):
            rest = next((name for name in sorted(world.subjects) if name not in names), "style")
            # With all of them merged, the style is what another LoRA is.
            other = style if rest == "style" else world.concepts([rest], trained)[0].lora
            alone = [(SINGLE, (name,)) for name in names]
            for label, shown in [*alone, *((label, names) for label in given.methods.split(","))]:
                key = json.dumps([label, trained, rest, *shown])
                known = read(path).get("runs", {}).get(key, {})
                missing = {name: use for name, use in uses.items() if name not in known}
                if not missing:
                    continue
                if time.monotonic() > given.until:
                    raise SystemExit("stopped by --seconds; the next run goes on")
                beside = Beside(other, style)
                found = {**known, **rounded(measure(world, label, shown, trained, beside, missing))}
                write(path, {"runs": {**read(path).get("runs", {}), key: found}})
                print(key, found, flush=True)


if __name__ == "__main__":
    main()
