"""Tables of the toybox itself (see :mod:`tables`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from markdown_tables import lines
from outputs import ROOT


def toybox() -> list[str]:
    data = json.loads((ROOT / "toybox" / "quality.json").read_text(encoding="utf-8"))
    base, judge = data["base"], data["judge"]
    parts = ("shape", "pattern", "color1", "color2", "background")
    read = " / ".join(f"{judge[f'judge_{part}']:.1%}" for part in parts).replace("%", " %")
    rows = [
        ("base, one object: shape, colour and background all right",
         _share(base["one_shape_color_background"]), "95 %"),
        ("base, two objects: both shapes right, each in its half",
         _share(base["two_both_shapes"]), "80 %"),
        ("base, two objects: both shapes and both colours right", _share(base["two_all"]), ""),
        ("CLIP: text to image, top-1 of 32 (20 sets, patterns included)",
         _share(data["clip_top1_of_32"]), "90 %"),
        ("judge on drawn pictures: shape / pattern / first / second colour / background",
         read, "97 %"),
    ]  # fmt: skip
    return lines(("what", "share", "aim"), rows)


def toybox_concepts() -> list[str]:
    folder = ROOT / "toybox"
    world = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    scores = json.loads((folder / "quality.json").read_text(encoding="utf-8"))["concepts"]
    rows = [
        (
            f"`{entry['token']}`",
            _thing(entry),
            str(entry["alpha"]),
            entry["layout"],
            _share(scores[entry["token"]]["attributes"]),
            _share(scores[entry["token"]]["all_four"]),
        )
        for kind in ("concepts", "pivotal_concepts")
        for entry in world[kind]
    ]
    head = ("concept", "what it is", "alpha", "layout", "attributes right", "all four at once")
    return lines(head, rows)


def _thing(entry: Mapping[str, Any]) -> str:
    second, pattern = entry["color2"], entry["pattern"]
    count = "" if pattern in ("stripes", "quarters") else "a "
    singular = {"halves": "half"}.get(pattern, pattern)
    return f"{entry['color1']} {entry['class_word']} with {count}{second} {singular}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


TABLES: dict[str, Callable[[], list[str]]] = {
    "toybox": toybox,
    "toybox concepts": toybox_concepts,
}
