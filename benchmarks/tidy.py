"""One LoRA kept to its trigger by the preset tidy: ``python benchmarks/tidy.py [--world emoji]``.

``judge`` is the share of a subject's attributes that are right on new words, with its LoRA and
with the tidied one; of an emoji, whether it is the likest of all, and ``likeness`` is that to its
references. ``class`` and ``others`` are how far the tidied LoRA is from the base on prompts with
the class word alone and with other class words, ‖f_tidied − f_base‖ / ‖f_LoRA − f_base‖ of the
outputs: 0 for the base, 1 for the LoRA. Writes ``results/tidy_WORLD.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from outputs import read, result_file, rounded, write
from protocol import emoji, toybox
from protocol.emoji import EmojiWorld
from protocol.held_out import merged
from worlds import WORLDS

from iteris_core import Calibration, Concept, Lora, LowRank
from iteris_core.activations.lockstep import Lockstep
from iteris_core.passes.changes import added, changes_of

_SEED, _BATCH = 99, 16


def outputs(
    world: Any, lora: Lora, prompts: Sequence[str], changes: Sequence[Mapping[str, LowRank]]
) -> list[torch.Tensor]:
    """The denoiser's outputs with each of ``changes``, on latents denoised under ``lora``."""
    concept = Concept(lora, prompts)
    calibration = Calibration(
        samples=12, timesteps=3, seed=_SEED, contexts=0.0, conditions=0.0, empty_share=0.0
    )
    host, generator = world.host, torch.Generator().manual_seed(_SEED)
    with torch.no_grad(), Lockstep(host.sites(), changes_of([concept])) as lockstep:
        samples: Any = host.samples(
            [concept], lora.sites.keys(), calibration, lockstep, generator, lambda *_: None
        )
    rows = range(len(samples.text.owners))
    parts = [list(rows[start : start + _BATCH]) for start in range(0, len(rows), _BATCH)]
    found: list[torch.Tensor] = []
    for some in changes:
        with torch.no_grad(), added(host, some):
            found.append(torch.cat([host.forward(samples, part) for part in parts]).double())
    return found


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
        base, before, after = outputs(world, lora, prompts, ({}, lora.sites, tidied.sites))
        found[label] = float((after - base).norm() / (before - base).norm())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=("toybox", "reported", "emoji"), default="reported")
    parser.add_argument("--count", type=int, default=4)
    given = parser.parse_args()
    world: Any = WORLDS[given.world]()
    path = result_file(f"tidy_{given.world}.json")
    for name in world.subjects[: given.count]:
        if name in read(path).get("runs", {}):
            continue
        found = rounded(measure(world, name))
        write(path, {"runs": {**read(path).get("runs", {}), name: found}})
        print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main()
