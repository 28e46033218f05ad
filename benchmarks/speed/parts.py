"""Where the time of a merge goes, part by part, and a trace for a viewer.

``python benchmarks/speed/parts.py [toybox|t5|sd15] [--trace trace.json]`` prints, and writes to
``benchmarks/results/parts.json``, the seconds of this thread's CPU in each part of a merge with the
defaults, and those of a bare forward of the same rows, see :mod:`floor`: so that what else the
machine does counts little.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from floor import sd15, t5_base, toybox

from iteris_core import merge
from iteris_core.activations.collect import SweepCollector
from iteris_core.activations.site import LinearSite, Site
from iteris_core.activations.tokens import ConceptTokens
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.transformers import TransformersHost
from iteris_core.passes import sweep
from iteris_core.solve.inputs import InputMoments
from iteris_core.solve.moments import MomentReduction
from iteris_core.solve.output import OutputMoments
from iteris_core.solve.rows import OutputRows

sys.path.append(str(Path(__file__).parents[1]))

from outputs import read, result_file, write

PARTS = {
    "rows": [(DiffusersHost, "samples"), (TransformersHost, "samples")],
    "a dry row, the plan": [(merge, "unmergeable_sites"), (sweep, "planned")],
    "the changes' products": [(LinearSite, "add"), (Site, "add")],
    "inputs' moments": [(InputMoments, "add")],
    "targets": [(ConceptTokens, "target")],
    "targets' moments": [(OutputMoments, "_add_targets")],
    "other reductions": [(SweepCollector, "take"), (OutputRows, "add")],
    "solves": [(MomentReduction, "solve"), (OutputRows, "solve")],
}
MODELS = {
    "toybox": toybox,
    "t5": t5_base,
    "sd15": lambda: sd15(samples=4),
}


class Clock:
    """Seconds of this thread's CPU by part, each without those of the parts within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._within = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        started = time.thread_time()
        self._within.append(0.0)
        try:
            yield
        finally:
            taken = time.thread_time() - started
            self.seconds[name] += taken - self._within.pop()
            self._within[-1] += taken


def shares(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds by part; ``forward`` is what no part has: the forwards themselves."""
    clock = Clock()
    with ExitStack() as stack:
        for part, places in PARTS.items():
            for owner, name in places:
                own = vars(owner)[name]
                timed: Any = (
                    property(clock.timed(part, own.fget))
                    if isinstance(own, property)
                    else clock.timed(part, own)
                )
                stack.enter_context(patch.object(owner, name, timed))
        with clock.part("forward"):
            run()
    return {**clock.seconds, "total": sum(clock.seconds.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS, nargs="?", default="toybox")
    parser.add_argument("--trace", help="A file for chrome://tracing or Perfetto")
    arguments = parser.parse_args()
    runs = MODELS[arguments.model]()
    runs["bare"]()
    found = {name: shares(runs[name]) for name in ("bare", "merge")}
    print(json.dumps(found, indent=1))
    file = result_file("parts.json")
    write(file, {**read(file), arguments.model: found})
    if arguments.trace:
        with torch.profiler.profile() as profile:
            runs["merge"]()
        profile.export_chrome_trace(arguments.trace)


if __name__ == "__main__":
    main()
