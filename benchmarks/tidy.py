"""One LoRA kept to its trigger by the preset tidy: ``python benchmarks/tidy.py [--world emoji]``.

``judge`` is the share of a subject's attributes that are right on new words, with its LoRA and
with the tidied one; of an emoji, whether it is the likest of all, and ``likeness`` is that to its
references. ``class`` and ``others`` are how far the tidied LoRA is from the base on prompts with
the class word alone and with other class words, ‖f_tidied − f_base‖ / ‖f_LoRA − f_base‖ of the
outputs: 0 for the base, 1 for the LoRA. Writes ``results/tidy_WORLD.json``.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from statistics import fmean
from typing import Any

from outputs import once, result_file
from protocol import emoji, toybox
from protocol.emoji import EmojiWorld
from protocol.held_out import merged
from protocol.new_rows import NewRows, relative
from worlds import WORLDS

from iteris_core import Concept, Lora

_SEED = 99


def measure(world: Any, name: str) -> dict[str, float]:
    concept = world.concepts([name], 0)[0]
    lora = concept.lora or Lora({})
    began = time.process_time()
    tidied = merged(world, [concept], preset="tidy")
    seconds = time.process_time() - began
    wanted = world.prompted("new words", [name], 1)
    known = [one.class_word for one in world.concepts(world.subjects, 0)]
    own, new = concept.class_word, emoji.NEW if isinstance(world, EmojiWorld) else toybox.NEW
    others = [word for word in dict.fromkeys(known) if word != own]
    found: dict[str, float] = {"seconds": seconds}
    for label, one in (("LoRA", lora), ("tidied", tidied)):
        read_as = world.read(world.draw(one, wanted), wanted)
        for figure in ("judge", "likeness"):
            found[f"{figure} {label}"] = fmean(p[figure] for p in read_as)
    for label, words in (("class", [own]), ("others", others)):
        prompts = [f"a {word} on a {background} background" for word in words for background in new]
        rows = NewRows(world.host, [Concept(lora, prompts)], _SEED, samples=12)
        base, before, after = (
            rows.outputs(changes, rows.of[0]) for changes in ({}, lora.sites, tidied.sites)
        )
        found[label] = relative(after, base, before)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=("toybox", "reported", "emoji"), default="reported")
    given = parser.parse_args()
    world: Any = WORLDS[given.world]()
    path = result_file(f"tidy_{given.world}.json")
    for name in world.subjects[:4]:
        once(path, name, math.inf, partial(measure, world, name))


if __name__ == "__main__":
    main()
