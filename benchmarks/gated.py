"""Merges on a model that gates what its blocks add: ``python benchmarks/gated.py``.

The denoiser's error on prompts that no row had, of the reported things of ``benchmarks/emoji``, a
FLUX in miniature: ‖f_merged − f_LoRA‖ / ‖f_base − f_LoRA‖ of its final outputs, on rows of each
LoRA. LoRAs are whole (``all``) or cut to their attention layers (``attention``), where feed-forward
outputs are left to repairs. Under the conditions of use both are loaded alike: at another strength,
or beside another LoRA. Writes ``results/gated.json`` and goes on where it stopped. Settings were
chosen on ``--chosen --sizes 5``, which writes ``results/gated_chosen.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import emoji
import rivals  # noqa: F401 (registers them)
from conditions import merged
from outputs import asked, once, result_file
from protocol.emoji import NEW, EmojiWorld
from protocol.plan import sets_of
from protocol.uses_of_rows import Errors

from iteris_core import Concept, Lora

SETS = {5: 4, 7: 4, 9: 4}
"""How many LoRAs → sets."""
METHODS = ("iteris", "chain-of-merges:conditions=0", "iteris:repair=False:saliency=0")


def cut(lora: Lora | None, layers: str) -> Lora:
    sites = {} if lora is None else lora.sites
    return Lora({s: c for s, c in sites.items() if layers == "all" or ".attn." in s})


def measured(
    world: EmojiWorld, concepts: Sequence[Concept], label: str, errors: Callable[[], Errors]
) -> Any:
    """Errors of a merge by use, its norm and seconds."""
    lora, found = merged(world, concepts, label, 0)
    known = errors()
    return {**known.errors(lora.sites), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", choices=("all", "attention"), default="attention")
    parser.add_argument("--sizes", default=",".join(map(str, SETS)))
    parser.add_argument("--chosen", action="store_true", help="of the first things, not reported")
    parser.add_argument("--methods", default=",".join(METHODS))
    given = asked(parser)
    world = EmojiWorld()
    path = result_file("gated_chosen.json" if given.chosen else "gated.json")
    for size in map(int, given.sizes.split(",")):
        chosen = [tuple(emoji.subjects())[:size]]
        reported = [of for again in (0, 1) for of in sets_of(world.subjects, size, again)]
        for names in chosen if given.chosen else reported[: SETS[size]]:
            concepts = [
                replace(concept, lora=cut(concept.lora, given.layers))
                for concept in world.concepts(names, 0)
            ]
            rest = next(name for name in world.subjects if name not in names)
            other = cut(world.concepts([rest], 0)[0].lora, given.layers)
            templates = [f"a {{}} on a {background} background" for background in NEW]
            errors = cache(partial(Errors, world, concepts, other.sites, templates))
            for label in given.methods.split(","):
                key = json.dumps([given.layers, label, *names])
                once(path, key, given.until, partial(measured, world, concepts, label, errors))


if __name__ == "__main__":
    main()
