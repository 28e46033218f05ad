"""Merged LoRAs under conditions of use: ``python benchmarks/conditions.py [--world toybox]``.

People load a LoRA at other strengths, and beside another one. Each merge is drawn on new words
under each of :data:`CONDITIONS`, and so is each LoRA alone. ``norm`` is the merge's norm as a
multiple of what the LoRAs have together, (Σ ‖ΔW_i‖²)^½. Writes ``results/conditions_WORLD.json``
and goes on where it stopped (``--seconds``).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from outputs import read, result_file, rounded, write
from protocol.plan import SINGLE, Variant, sets_of
from protocol.world import World
from worlds import WORLDS

from iteris_core import Calibration, Lora, merge_loras
from iteris_core.lora import concatenate

SETS = {2: 3, 5: 1}
METHODS = ("iteris", "iteris:bound=0:conditions=0", "chain-of-merges:conditions=0", "average")


def loaded(lora: Lora, text: float = 1.0, rest: float = 1.0) -> Lora:
    """At a strength in the text encoders, and at another one elsewhere."""
    of_text = {site: site.startswith("text_encoder") for site in lora.sites}
    return Lora({s: c.scaled(text if of_text[s] else rest) for s, c in lora.sites.items()})


def beside(lora: Lora, other: Lora, strength: float) -> Lora:
    sites = dict(lora.sites)
    for site, change in loaded(other, strength, strength).sites.items():
        sites[site] = concatenate([sites[site], change]) if site in sites else change
    return Lora(sites)


CONDITIONS: Mapping[str, Callable[[Lora, Lora], Lora]] = {
    "plain": lambda lora, _: lora,
    "0.8": lambda lora, _: loaded(lora, 0.8, 0.8),
    "1.2": lambda lora, _: loaded(lora, 1.2, 1.2),
    "text 0.6": lambda lora, _: loaded(lora, 0.6),
    "another at 0.6": lambda lora, other: beside(lora, other, 0.6),
    "another at 1": lambda lora, other: beside(lora, other, 1.0),
}
"""``of(lora, other)`` is what is loaded; ``other`` is a concept that no prompt names."""


def norm(lora: Lora) -> float:
    return math.sqrt(sum(change.squared_norm() for change in lora.sites.values()))


def measured(world: World, label: str, names: Sequence[str], other: Lora) -> dict[str, Any]:
    """Condition → figures of a merge, or of each LoRA alone; and its ``norm``."""
    concepts = world.concepts(names, 0)
    loras = [concept.lora for concept in concepts if concept.lora is not None]
    if label == SINGLE:
        drawn, found = [([name], lora) for name, lora in zip(names, loras, strict=True)], {}
    else:
        how = Variant.parsed(label)
        calibration = Calibration.from_mapping({**world.half, "seed": 0, **how.calibration})
        began = time.process_time()
        merged = merge_loras(
            world.host, concepts, how.method, settings=how.settings, calibration=calibration
        ).lora
        seconds = time.process_time() - began
        ratio = norm(merged) / math.hypot(*map(norm, loras))
        drawn, found = [(list(names), merged)], {"norm": ratio, "seconds": seconds}
    for condition, of in CONDITIONS.items():
        pictures: list[Mapping[str, float]] = []
        for shown, lora in drawn:
            wanted = world.prompted("new words", shown, 1)
            pictures += world.read(world.draw(of(lora, other), wanted), wanted)
        found[condition] = {name: fmean(p[name] for p in pictures) for name in pictures[0]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=sorted(WORLDS), default="toybox")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after")
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    world = WORLDS[given.world]()
    path = result_file(f"conditions_{given.world}.json")
    for size, count in SETS.items():
        for names in sets_of(world.subjects, size, 0)[:count]:
            rest = next(name for name in sorted(world.subjects) if name not in names)
            (other,) = world.concepts([rest], 0)
            for label in (SINGLE, *given.methods.split(",")):
                data = read(path)
                key = json.dumps([label, *names])
                if key in data.get("runs", {}):
                    continue
                if time.monotonic() > until:
                    raise SystemExit("stopped by --seconds; the next run goes on")
                assert other.lora is not None
                found = measured(world, label, names, other.lora)
                runs = {**data.get("runs", {}), key: rounded(found)}
                write(path, {"runs": runs})
                print(key, rounded(found), flush=True)


if __name__ == "__main__":
    main()
