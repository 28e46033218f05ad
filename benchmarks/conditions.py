"""Merged LoRAs under conditions of use: ``python benchmarks/conditions.py [--world toybox]``.

People load a LoRA at other strengths, beside another one, with another sampler, on a rounded base.
Each merge is drawn on new words under each of :data:`CONDITIONS`, and so is each LoRA alone.
``norm`` is the merge's norm as a multiple of what the LoRAs have together, (Σ ‖ΔW_i‖²)^½. Writes
``results/conditions_WORLD.json`` and goes on where it stopped (``--seconds``).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import rivals  # noqa: F401 (registers them)
import styles
import torch
from diffusers import EulerAncestralDiscreteScheduler
from outputs import read, result_file, rounded, write
from protocol.drawing import draw
from protocol.plan import SINGLE, Variant, sets_of
from protocol.toybox import ToyboxWorld
from worlds import WORLDS

from iteris_core import Calibration, Lora, LowRank, merge_loras
from iteris_core.lora import concatenate

SETS = {"toybox": {2: 3, 5: 1}, "reported": {2: 2, 3: 2, 5: 1, 7: 1, 10: 1}}
"""World → how many LoRAs → sets of each training."""
METHODS = ("iteris", "iteris:bound=0:conditions=0", "chain-of-merges:conditions=0", "average")


@dataclass(frozen=True)
class Beside:
    """What may be loaded beside: a ``concept`` that no prompt names, a ``style``."""

    concept: Lora
    style: Lora


def loaded(lora: Lora, text: float = 1.0, rest: float = 1.0) -> Lora:
    """At a strength in the text encoders, and at another one elsewhere."""
    of_text = {site: site.startswith("text_encoder") for site in lora.sites}
    return Lora({s: c.scaled(text if of_text[s] else rest) for s, c in lora.sites.items()})


def both(lora: Lora, other: Lora, strength: float) -> Lora:
    sites = dict(lora.sites)
    for site, change in loaded(other, strength, strength).sites.items():
        sites[site] = concatenate([sites[site], change]) if site in sites else change
    return Lora(sites)


@dataclass(frozen=True)
class Use:
    """What is loaded in place of a LoRA; options of the pipeline; a dtype of all patched weights;
    and whether the sampler is Euler's ancestral one."""

    of: Callable[[Lora, Beside], Lora] = lambda lora, _: lora
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    weights: torch.dtype | None = None
    ancestral: bool = False


CONDITIONS: Mapping[str, Use] = {
    "plain": Use(),
    "0.8": Use(lambda lora, _: loaded(lora, 0.8, 0.8)),
    "1.2": Use(lambda lora, _: loaded(lora, 1.2, 1.2)),
    "text 0.6": Use(lambda lora, _: loaded(lora, 0.6)),
    "another at 0.6": Use(lambda lora, more: both(lora, more.concept, 0.6)),
    "another at 1": Use(lambda lora, more: both(lora, more.concept, 1.0)),
}
FURTHER: Mapping[str, Use] = {
    "style at 0.6": Use(lambda lora, more: both(lora, more.style, 0.6)),
    "guidance 1.5": Use(options={"guidance_scale": 1.5}),
    "guidance 8": Use(options={"guidance_scale": 8.0}),
    "8 steps": Use(options={"num_inference_steps": 8}),
    "ancestral": Use(ancestral=True),
    "bfloat16": Use(weights=torch.bfloat16),
    "float8": Use(weights=torch.float8_e4m3fn),
}


def rounded_to(world: ToyboxWorld, lora: Lora, dtype: torch.dtype) -> Lora:
    """A change that rounds every layer's patched weight to ``dtype``."""
    sites: dict[str, LowRank] = {}
    for site, module in world.host.sites().items():
        weight: torch.Tensor = module.weight.data.flatten(1)
        patched = weight.clone()
        if site in lora.sites:
            patched += lora.sites[site].dense().reshape(weight.shape)
        sites[site] = LowRank(patched.to(dtype).float() - weight, torch.eye(weight.shape[1]))
    return Lora(sites)


def figures(world: ToyboxWorld, lora: Lora, names: Sequence[str], use: Use) -> dict[str, float]:
    wanted = world.prompted("new words", names, 1)
    if use.weights is not None:
        lora = rounded_to(world, lora, use.weights)
    kept = world.pipeline.scheduler
    if use.ancestral:
        world.pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(kept.config)
    try:
        options = {**world.sampling, **use.options}
        images = draw(world.pipeline, world.host, lora, wanted, **options)
    finally:
        world.pipeline.scheduler = kept
    pictures = world.read(images, wanted)
    return {name: fmean(p[name] for p in pictures) for name in pictures[0]}


def merged(
    world: ToyboxWorld, label: str, names: Sequence[str], trained: int
) -> tuple[Lora, dict[str, Any]]:
    """The merge, and its ``norm`` and ``seconds``."""
    concepts, how = world.concepts(names, trained), Variant.parsed(label)
    calibration = Calibration.from_mapping({**world.half, "seed": trained, **how.calibration})
    began = time.process_time()
    lora = merge_loras(
        world.host, concepts, how.method, settings=how.settings, calibration=calibration
    ).lora
    seconds = time.process_time() - began
    together = math.hypot(*(norm(c.lora) for c in concepts if c.lora is not None))
    return lora, {"norm": norm(lora) / together, "seconds": seconds}


def norm(lora: Lora) -> float:
    return math.sqrt(sum(change.squared_norm() for change in lora.sites.values()))


def sets(world: str, subjects: Sequence[str], trained: int) -> Iterator[tuple[str, ...]]:
    for size, count in SETS[world].items():
        yield from sets_of(subjects, size, trained)[:count]


def measure(
    world: ToyboxWorld,
    label: str,
    names: Sequence[str],
    trained: int,
    more: Beside,
    uses: Mapping[str, Use],
) -> dict[str, Any]:
    """Use → figures of a merge, or of the one LoRA alone."""
    if label == SINGLE:
        lora, found = world.concepts(names, trained)[0].lora or Lora({}), dict[str, Any]()
    else:
        lora, found = merged(world, label, names, trained)
    return {**found, **{n: figures(world, u.of(lora, more), names, u) for n, u in uses.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=sorted(SETS), default="toybox")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--trainings", type=int, default=1)
    parser.add_argument("--further", action="store_true", help="of the first training")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after")
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    world: Any = WORLDS[given.world]()
    style = world.host.read_lora(next(iter(styles.styles().values())).lora)
    path = result_file(f"conditions_{given.world}.json")
    for trained in range(given.trainings):
        uses = {**CONDITIONS, **(FURTHER if given.further and not trained else {})}
        for names in sets(given.world, sorted(world.subjects), trained):
            rest = next((name for name in sorted(world.subjects) if name not in names), "style")
            # With all of them merged, the style is what another LoRA is.
            other = style if rest == "style" else world.concepts([rest], trained)[0].lora
            alone = [(SINGLE, (name,)) for name in names]
            for label, shown in [*alone, *((label, names) for label in given.methods.split(","))]:
                key = json.dumps([label, trained, rest, *shown])
                if key in read(path).get("runs", {}):
                    continue
                if time.monotonic() > until:
                    raise SystemExit("stopped by --seconds; the next run goes on")
                found = rounded(measure(world, label, shown, trained, Beside(other, style), uses))
                write(path, {"runs": {**read(path).get("runs", {}), key: found}})
                print(key, found, flush=True)


if __name__ == "__main__":
    main()
