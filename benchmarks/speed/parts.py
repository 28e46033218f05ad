"""Against the limit: the parts of a merge's time, each over the bare forwards of its rows.

The functions that do a part are wrapped here, and a part inside another counts for itself alone.
``forwards`` run with hooks; ``hooks`` add changes and keep streams; ``moments`` choose tokens and
directions, and add up; ``looking`` is the probe with the plan, ``held out`` what the report
measures, ``copies`` moves what waits, and ``rest`` is everything else, samples and words too. The
bare forwards are those of the merge itself, in the same micro-batches, run again without hooks.
Times are of the process, so that other processes disturb them little; use one thread.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from models import filled, prompt_concepts, random_lora, sd15_host

from iteris_core import Calibration, Concept, merge, merge_loras
from iteris_core.activations.activation_offload import ActivationOffload
from iteris_core.activations.lockstep import Lockstep
from iteris_core.activations.micro_batch import MicroBatch
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.passes import preflight, sweep
from iteris_core.passes.collect import Collector
from iteris_core.passes.sweep import Passes


class Clock:
    """Seconds by part; what runs counts for the innermost part entered."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._part, self._since = "rest", time.process_time()

    def enter(self, part: str) -> str:
        """Count for ``part`` from now on; returns the part before."""
        now, before = time.process_time(), self._part
        self.seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(before)

        return run


PARTS = {
    "looking": [(preflight, "unmergeable_sites"), (Passes, "plan")],
    "hooks": [(Lockstep, "_keep")],
    "moments": [(Collector, "observe")],
    "solves": [(Passes, "_solve")],
    "copies": [(ActivationOffload, "turn"), (ActivationOffload, "rest")],
    "held out": [(merge, "kept")],
    "rest": [(MicroBatch, "wait")],  # another forward goes on, or a solve
}


@contextmanager
def timing() -> Iterator[tuple[Clock, list[Callable[[], None]]]]:
    """Context in which merges are timed; yields the clock and the bare forwards of their rows."""
    clock, bare = Clock(), list[Callable[[], None]]()
    hook, batches = Lockstep._hook, sweep.micro_batches

    def timed_batches(stage: Any, copies: int, observer: Any, *more: Any) -> Iterator[MicroBatch]:
        for batch in batches(stage, copies, observer, *more):
            if observer is not None:
                bare.append(batch.run)
            batch.run = clock.timed("forwards", batch.run)
            yield batch

    with ExitStack() as stack:
        for part, functions in PARTS.items():
            for where, name in functions:
                timed = clock.timed(part, getattr(where, name))
                stack.enter_context(patch.object(where, name, timed))
        timed_hook = lambda *given: clock.timed("hooks", hook(*given))  # noqa: E731
        stack.enter_context(patch.object(Lockstep, "_hook", timed_hook))
        stack.enter_context(patch.object(sweep, "micro_batches", timed_batches))
        yield clock, bare


def sd15(quick: bool) -> tuple[Any, list[Concept], Calibration]:
    """At half of its widths, 256 px."""
    host = sd15_host(160)
    return host, prompt_concepts(host, 2, 32), _calibration(50, quick, latent_size=32)


def emoji(quick: bool) -> tuple[Any, list[Concept], Calibration]:
    from worlds import WORLDS

    world = WORLDS["emoji"]()
    return world.host, world.concepts(world.subjects[:2], 0), _calibration(50, quick, **world.half)


def flux(quick: bool) -> tuple[Any, list[Concept], Calibration]:
    """One block of each kind at FLUX.1's widths, with the words of the emoji world."""
    from diffusers import FluxTransformer2DModel
    from emoji import load_pipeline

    pipeline = load_pipeline()
    size = {**pipeline.transformer.config, "num_layers": 1, "num_single_layers": 1}
    size |= {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(size)
    pipeline.transformer = filled(transformer)
    host = DiffusersHost(pipeline)
    parts = ".to_", ".add_", ".ff.net", ".ff_context.net", ".proj_mlp", ".proj_out"
    some = [s for s in host.sites() if "block" in s and any(part in s for part in parts)]
    loras = [random_lora(host, seed, 16, some.__contains__) for seed in range(2)]
    concepts = [
        Concept(lora, trigger=f"sks{n}", class_word="cat") for n, lora in enumerate(loras, 1)
    ]
    return host, concepts, _calibration(16, quick)


def _calibration(samples: int, quick: bool, **more: Any) -> Calibration:
    few = {"samples": 4, "timesteps": 1} if quick else {"samples": samples, "timesteps": 2}
    return Calibration(latents="noise", **few, **more)


MODELS = {"sd15": sd15, "emoji": emoji, "flux": flux}


def compare(model: str, rounds: int, *, quick: bool) -> dict[str, Any]:
    """Medians of the rounds: each part, and the whole merge, over its bare forwards."""
    host, concepts, calibration = MODELS[model](quick)
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        with timing() as (clock, bare):
            merge_loras(host, concepts, calibration=calibration)
            clock.enter("rest")
        started = time.process_time()
        with torch.no_grad():
            for run in bare:
                run()
        seconds = time.process_time() - started
        clock.seconds["merge"] = sum(clock.seconds.values())
        found["bare seconds"].append(seconds)
        for part in ("merge", "forwards", *PARTS):
            found[part].append(clock.seconds[part] / seconds)
    return {part: median(some) for part, some in found.items()}
