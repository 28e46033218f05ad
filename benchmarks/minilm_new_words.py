"""Prompts that no calibration saw, where words share features: the world of `minilm/`.

    PYTHONPATH=. python benchmarks/minilm_new_words.py sks,zwx [METHOD '{"setting": value}']…

Fields of the calibration are settings here as well, such as "contexts" and "generic".
Draws each concept by calibration prompts (seen), and by prompts without any word of a template: in
words that generic captions have (contexts) and in words that no row has, whatever the method (new).
"+generic" behind a method adds rows on captions of the base's own. Writes a line of JSON for each
row into the file of ``--into``, and the table of all of them into ``--table``.
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
from outputs import BUILD
from protocol.minilm import MiniLmWorld

from iteris_core import Calibration, Lora, merge_loras

KINDS: dict[Kind, int] = {"seen": 6, "contexts": 10, "new": 14}
"""Prompts of each concept."""

ROWS: list[tuple[str, dict[str, Any]]] = [
    ("iteris", {}),
    ("iteris", {"ridge": 1e-5}),
    ("iteris", {"ridge": 1e-4}),
    ("iteris", {"ridge": 1e-3}),
    ("iteris+generic", {}),
    ("iteris+generic", {"ridge": 1e-5}),
    ("iteris+generic", {"ridge": 1e-4}),
    ("regmean++", {}),
    ("average", {}),
    ("sum", {}),
    ("ssr", {}),
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
    method, _, more = method.partition("+generic") if "+generic" in method else (method, "", None)
    concepts = world.concepts(names)
    if more is not None:
        concepts.append(world.generic())
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


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Markdown: attributes right / background right."""
    lines = [
        "| LoRAs | method | seen | new contexts | new words | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        cells = [f"{entry[kind][0]:.2f} / {entry[kind][1]:.2f}" for kind in KINDS]
        lines.append(
            f"| {len(entry['names'])} | {entry['label']} | {' | '.join(cells)} | "
            f"{entry['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names")
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--into", type=Path, default=BUILD / "minilm_new_words.jsonl")
    parser.add_argument("--table", type=Path, default=BUILD / "minilm.md")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing after these"
    )
    asked = parser.parse_args()
    until = time.time() + asked.seconds
    names = asked.names.split(",")
    given = zip(asked.rows[::2], map(json.loads, asked.rows[1::2]), strict=True)
    rows = list(given) or [("base", {}), ("alone", {}), *ROWS]
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
        asked.table.write_text(table(known))
        print(table([entry]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
