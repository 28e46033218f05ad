"""A page of pairs for people to judge: ``python benchmarks/blind.py --world toybox --pairs 60``.

Each pair shows a concept's own pictures above two pictures of one prompt and one noise, by two
methods, on a side that chance decides. ``build/blind/index.html`` needs no server and does not say
which is which; its button saves what was chosen as ``answers.json``. ``build/blind/key.json`` has
the sides. ``--count answers.json`` prints how often each method was chosen.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from outputs import BUILD, write
from PIL import Image
from protocol.held_out import merged
from protocol.plan import Unit, sets_of
from worlds import HELP, world_of

FOLDER = BUILD / "blind"
KEY = FOLDER / "key.json"
_PAGE = """<!doctype html><meta charset="utf-8"><title>Which is more like it?</title>
<style>body{{font:16px sans-serif;max-width:44rem;margin:auto;text-align:center}}
img{{width:12rem;image-rendering:pixelated;margin:.3rem}}.small img{{width:5rem}}
label{{display:inline-block;padding:.5rem}}fieldset{{margin:1rem 0}}</style>
<h1>Which picture shows this thing better?</h1>
<form>{pairs}<button>Save answers.json</button></form>
<script>document.querySelector("form").onsubmit=e=>{{e.preventDefault();
const chosen=Object.fromEntries(new FormData(e.target));const link=document.createElement("a");
link.href=URL.createObjectURL(new Blob([JSON.stringify(chosen)],{{type:"application/json"}}));
link.download="answers.json";link.click()}}</script>"""
_PAIR = """<fieldset><p>{number}. {prompt}</p><p class="small">{references}</p>
<label>{left}<br><input type="radio" name="{number}" value="left"> left</label>
<label>{right}<br><input type="radio" name="{number}" value="right"> right</label>
<p><label><input type="radio" name="{number}" value="neither"> neither</label></p></fieldset>"""


def picture(image: Image.Image) -> str:
    data = io.BytesIO()
    image.convert("RGB").save(data, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def pairs(world: Any, methods: list[str], size: int, count: int) -> list[tuple[Any, list[Any]]]:
    """What to draw, and its pictures by each method."""
    found: list[tuple[Any, list[Any]]] = []
    for names in sets_of(world.subjects, size, 0):
        wanted = world.prompted("new words", names, 1)
        columns: list[list[Image.Image]] = []
        for how in map(Unit.parsed, methods):
            concepts = world.concepts(names, 0)
            fields = {"settings": how.settings, "calibration": how.calibration}
            columns.append(world.draw(merged(world, concepts, how.method, **fields), wanted))
        found += [(one, list(two)) for one, *two in zip(wanted, *columns, strict=True)]
    order = np.random.default_rng(0).permutation(len(found))[:count]
    return [found[number] for number in order]


def make(world: Any, methods: list[str], size: int, count: int) -> None:
    rng = np.random.default_rng()
    key: dict[str, list[str]] = {}
    shown: list[str] = []
    for number, (wanted, images) in enumerate(pairs(world, methods, size, count), 1):
        order = [int(side) for side in rng.permutation(2)]
        key[str(number)] = [methods[side] for side in order]
        left, right = (picture(images[side]) for side in order)
        references = "".join(map(picture, world.pictures_of(wanted.shown[0])[:4]))
        shown.append(
            _PAIR.format(
                number=number, prompt=html.escape(wanted.prompt), references=references,
                left=left, right=right,
            )
        )  # fmt: skip
    write(KEY, key)
    (FOLDER / "index.html").write_text(_PAGE.format(pairs="\n".join(shown)), encoding="utf-8")
    print(FOLDER / "index.html")


def counted(answers: Path) -> str:
    """How often each method was chosen, and Wilson's 95 % interval of the first one's share."""
    key = json.loads(KEY.read_text(encoding="utf-8"))
    chosen = json.loads(answers.read_text(encoding="utf-8"))
    sides = {"left": 0, "right": 1}
    wins = Counter(key[n][sides[side]] for n, side in chosen.items() if side in sides)
    methods = sorted({method for two in key.values() for method in two})
    n, first = wins.total(), wins[methods[0]]
    if not n:
        return "No pair was decided."
    z, share = 1.96, first / n
    middle, half = (
        share + z * z / (2 * n),
        z * math.sqrt(share * (1 - share) / n + (z / n) ** 2 / 4),
    )
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    lines = [f"{method}: {wins[method]}" for method in methods]
    lines.append(f"neither: {len(chosen) - n}")
    return "\n".join([*lines, f"{methods[0]}: {share:.0%} of {n}, {low:.0%} to {high:.0%}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="toybox", help=HELP)
    parser.add_argument("--methods", default="iteris,chain-of-merges:conditions=0", help="two")
    parser.add_argument("--size", type=int, default=5, help="how many LoRAs are merged")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--count", type=Path, metavar="ANSWERS", help="a saved answers.json")
    given = parser.parse_args()
    if given.count:
        print(counted(given.count))
    else:
        make(world_of(given.world), given.methods.split(","), given.size, given.pairs)


if __name__ == "__main__":
    main()
