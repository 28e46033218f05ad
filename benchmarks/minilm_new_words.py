"""Prompts that no calibration saw, where words share features: the world of `minilm/`.

    PYTHONPATH=. python benchmarks/minilm_new_words.py sks,zwx [METHOD '{"setting": value}']…

Fields of the calibration count as settings, such as "contexts" and "generic". The script draws each
concept by calibration prompts (seen) and by prompts without any word of a template: in words that
the generic captions have (contexts), and in words that no row has (new). It adds a line of JSON for
each row to ``results/minilm_new_words.jsonl``, and skips rows that are there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from minilm.prompts import Kind
from outputs import result_file
from protocol.minilm import MiniLmWorld

from iteris_core import Calibration, Lora, merge_loras

KINDS: dict[Kind, int] = {"seen": 6, "contexts": 10, "new": 14}
"""Prompts of each concept."""

OFF = {"contexts": 0, "generic": 0}
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("base", {}),
    ("alone", {}),
    ("iteris", {}),
    ("iteris", {"ridge": 1e-4}),
    ("iteris", OFF),
    ("iteris", {"ridge": 1e-4, **OFF}),
    ("regmean++", {}),
    ("regmean++", OFF),
    ("ssr", {}),
    ("ssr", OFF),
    ("average", {}),
    ("sum", {}),
]

Figures = dict[str, tuple[float, float]]
"""kind of prompts → attributes right, backgrounds right"""


def drawn(world: MiniLmWorld, lora: Lora | None, names: Sequence[str]) -> Figures:
    """What is right in pictures of ``names`` with the LoRA."""
    found: Figures = {}
    for kind, count in KINDS.items():
        wanted = [one for name in names for one in world.asked(name, kind, count)]
        with torch.autocast("cpu", torch.bfloat16):
            images = world.draw(lora, wanted)
        read = world.read(images, wanted)
        found[kind] = fmean(share for share, _ in read), fmean(right for _, right in read)
    return found


def merged(world: MiniLmWorld, names: Sequence[str], method: str, settings: Any) -> Lora:
    concepts = world.concepts(names)
    host = None if method in ("average", "sum") else world.host
    own = {name: settings[name] for name in settings if name in Calibration.__dataclass_fields__}
    settings = {name: value for name, value in settings.items() if name not in own}
    calibration = {**world.calibration, "seed": 0, **own}
    return merge_loras(host, concepts, method, settings=settings, calibration=calibration).lora


def alone(world: MiniLmWorld, names: Sequence[str]) -> Figures:
    """Each LoRA by itself."""
    each = [drawn(world, c.lora, [n]) for n, c in zip(names, world.concepts(names), strict=True)]
    return {
        kind: (fmean(e[kind][0] for e in each), fmean(e[kind][1] for e in each)) for kind in KINDS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names")
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--into", type=Path, default=result_file("minilm_new_words.jsonl"))
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing after these"
    )
    asked = parser.parse_args()
    until = time.time() + asked.seconds
    names = asked.names.split(",")
    given = zip(asked.rows[::2], map(json.loads, asked.rows[1::2]), strict=True)
    rows = list(given) or ROWS
    world = MiniLmWorld()
    known: list[dict[str, Any]] = []
    if asked.into.exists():
        known = [json.loads(line) for line in asked.into.read_text().splitlines()]
    for method, settings in rows:
        label = " ".join([method, *(f"{k} {v}" for k, v in settings.items())])
        if any(entry["names"] == names and entry["label"] == label for entry in known):
            continue
        if time.time() > until:
            break
        began = time.time()
        if method == "alone":
            found = alone(world, names)
        else:
            lora = None if method == "base" else merged(world, names, method, settings)
            found = drawn(world, lora, names)
        entry = {"names": names, "label": label, **found, "seconds": time.time() - began}
        known.append(entry)
        with asked.into.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
