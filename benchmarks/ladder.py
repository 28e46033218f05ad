"""What presets cost and keep: ``python benchmarks/ladder.py``.

Merges of the reported concepts by each preset, drawn on new words alone and under the conditions of
use (:data:`uses.CONDITIONS`). ``forwards`` counts the rows that go through the denoiser in a merge:
denoising, the sweep's two copies, and held-out rows. Kept is (merge − base) / (each LoRA alone −
base). ``least`` is a single prompt and timestep each, for :mod:`side_by_side`. ``--store`` counts
merges that find samples of earlier ones. Writes ``results/ladder.json`` and goes on where it
stopped (``--seconds``).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import styles
from conditions import Beside, figures
from outputs import asked, once, read, result_file, rounded, write
from protocol.held_out import merged as merge
from protocol.plan import sets_of
from protocol.toybox import ToyboxWorld
from uses import CONDITIONS
from worlds import WORLDS

from iteris_core import Lora, SampleStore
from iteris_core.settings import PRESETS, Preset

SETS = {2: 2, 5: 2, 8: 2}
"""How many LoRAs → sets."""
PLAIN = dict.fromkeys(("generic", "conditions", "contexts", "composites", "empty_share"), 0.0)
LEAST = {"samples": 1, "total_samples": None, "timesteps": 1, "denoising_steps": 1, **PLAIN}
RUNGS: Mapping[str, Preset] = {
    "fast": PRESETS["fast"],
    "default": PRESETS["default"],
    "best": PRESETS["best"],
    "least": Preset("", calibration=LEAST),
    "half the timesteps": Preset("", calibration={"timesteps": 2}),
    "half the prompts": Preset("", calibration={"samples": 40, "total_samples": 200}),
}


@contextmanager
def counted(pipeline: Any) -> Iterator[list[int]]:
    """The rows that go through the denoiser."""
    rows: list[int] = []
    parts = pipeline.components
    # Its first layer: recorded calls of the denoiser itself do not always run it.
    first = parts["unet"].conv_in if "unet" in parts else parts["transformer"].x_embedder
    hook = first.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        hook.remove()


def merged(world: ToyboxWorld, rung: str, names: tuple[str, ...]) -> tuple[Lora, dict[str, Any]]:
    preset = RUNGS[rung]
    began = time.process_time()
    with counted(world.pipeline) as rows:
        lora = merge(
            world,
            world.concepts(names),
            settings=preset.settings,
            calibration=preset.calibration,
        )
    return lora, {"forwards": sum(rows), "seconds": time.process_time() - began}


def measured(world: ToyboxWorld, rung: str, names: tuple[str, ...], more: Beside) -> dict[str, Any]:
    if rung == "alone":
        each = [measured(world, "one", (name,), more) for name in names]
        return {
            use: {k: fmean(one[use][k] for one in each) for k in each[0][use]} for use in each[0]
        }
    found: dict[str, Any] = {}
    if rung == "one":
        lora = world.concepts(names)[0].lora or Lora({})
    elif rung == "base":
        lora = Lora({})
    else:
        lora, found = merged(world, rung, names)
    return {
        **found,
        **{n: figures(world, u.of(lora, more), names, u) for n, u in CONDITIONS.items()},
    }


def stored(world: ToyboxWorld, names: tuple[str, ...], other: str) -> dict[str, Any]:
    """A first merge, one with a LoRA exchanged for ``other``, and one with another ridge."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, of, ridge in (
            ("first", names, None),
            ("exchanged", (*names[1:], other), None),
            ("another ridge", names, 1e-4),
        ):
            began = time.process_time()
            with counted(world.pipeline) as rows:
                merge(
                    world,
                    world.concepts(of),
                    settings={"ridge": ridge} if ridge else None,
                    store=SampleStore(Path(folder)),
                )
            found[label] = {"forwards": sum(rows), "seconds": time.process_time() - began}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rungs", default="fast,default")
    parser.add_argument("--sizes", default="2,5,8")
    parser.add_argument("--store", action="store_true", help="what kept samples save, of eight")
    given = asked(parser)
    world: Any = WORLDS["reported"]()
    style = world.host.read_lora(next(iter(styles.styles().values())).lora)
    path, every = result_file("ladder.json"), sorted(world.subjects)
    if given.store:
        names = sets_of(every, 8, 0)[0]
        other = next(name for name in every if name not in names)
        write(path, {**read(path), "store": rounded(stored(world, names, other))})
        return
    for size in map(int, given.sizes.split(",")):
        for names in sets_of(every, size, 0)[: SETS[size]]:
            rest = next(name for name in every if name not in names)
            more = Beside(world.concepts([rest])[0].lora, style)
            for rung in ("base", "alone", *given.rungs.split(",")):
                key = json.dumps([rung, *names])
                once(path, key, given.until, partial(measured, world, rung, names, more))


if __name__ == "__main__":
    main()
