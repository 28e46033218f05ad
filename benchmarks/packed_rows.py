"""Rows that wait at few bits: ``python benchmarks/packed_rows.py``, ``results/packed_rows.json``.

Where host memory is too small, the choice is between rows at 8 or 4 bits and half of the rows.
Merges of a pair and a five of the toybox's own concepts, on the templates of :mod:`contexts`, with
rows that wait in host memory by large blocks: as they are, at 8 bits, at 4, and half as many. The
toybox runs in single precision, of which everything is packed here. Of each: the error of
:mod:`held_out` on new words, and the share of attributes and of backgrounds that are right in
pictures.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import contexts
import torch
from held_out import HeldOut
from outputs import add, read, result_file
from toybox_world import World

from iteris_core import Calibration, merge_loras
from iteris_core.activations import packing
from iteris_core.activations.packing import FORMATS, PackedPlace
from iteris_core.passes import strategies
from iteris_core.passes.strategies import IN_HOST, PACKED

sys.path.insert(0, str(Path(__file__).parent / "speed"))
from ways import forced

FILE = result_file("packed_rows.json")
SETS = ((1, 4), (2, 3, 5, 7, 9))
WAY = f"{IN_HOST}, by large blocks"
CASES = {
    "as they are": (WAY, 4),
    **{f"at {bits} bits": (WAY + PACKED.format(bits), 4) for bits in FORMATS},
    "half of them": (WAY, 2),
}


def main() -> None:
    world = World()
    with ExitStack() as stack:
        stack.enter_context(patch.object(packing, "KINDS", (torch.float32,)))
        small = patch.object(
            strategies, "PackedPlace", lambda place, bits: PackedPlace(place, bits, least=4096)
        )
        stack.enter_context(small)
        for numbers in SETS:
            _measure(world, numbers)


def _measure(world: World, numbers: tuple[int, ...]) -> None:
    key = ",".join(map(str, numbers))
    backgrounds = map(contexts.ON.format, contexts.BACKGROUNDS["new"])
    held = HeldOut(world, numbers, None, tuple(backgrounds))
    found = read(FILE).get(key, {})
    for name, (way, timesteps) in CASES.items():
        calibration = Calibration(templates=contexts.TEMPLATES, timesteps=timesteps)
        with forced(way):
            concepts = world.merged_concepts(numbers)
            lora = merge_loras(world.host, concepts, calibration=calibration).lora
        error = round(held.errors(lora)["guided"], 3)
        found[name] = [error, *contexts.pictures(world, numbers, "new", lora)]
        print(key, name, found[name], flush=True)
        add(FILE, key, found)


if __name__ == "__main__":
    main()
