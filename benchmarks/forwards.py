"""How many rows a merge wants: the held-out error by prompts, timesteps and tokens of a picture.

``python benchmarks/forwards.py [rows|ridge|empty …]`` merges on the toybox at latents of 8 and 16
(64 and 256 tokens at its widest sites), on sets that the quality suite does not report, and prints
the held-out errors, see :mod:`held_out`; they come into ``benchmarks/results/forwards.json`` as
they are measured, and what stands there is not measured again. The toybox was trained at 8: at 16
it fills the picture with more things than a prompt names.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from held_out import SEEN, HeldOut
from toybox_world import World

from iteris_core import Calibration, merge_loras

RESULTS = Path(__file__).parent / "results" / "forwards.json"
PAIRS = (3, 5), (8, 9)
FIVE = (2, 3, 5, 7, 9)
GRID = ((50, 4), (50, 2), (50, 1), (25, 4), (25, 2), (25, 1), (12, 4), (12, 2))
"""Prompts and timesteps of each concept"""


@dataclass(frozen=True)
class Case:
    numbers: tuple[int, ...]
    latent_size: int
    samples: int = 50
    timesteps: int = 4
    empty_share: float = 0.2
    ridge: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """All but the set and the seed."""
        parts = asdict(self)
        return "  ".join(f"{n}={v}" for n, v in parts.items() if n not in ("numbers", "seed"))


def rows() -> Iterator[Case]:
    for numbers, (samples, timesteps) in itertools.product((*PAIRS, FIVE), GRID):
        yield Case(numbers, 8, samples, timesteps)
    for samples, timesteps in GRID[:4]:
        yield Case(PAIRS[0], 16, samples, timesteps)


def ridge() -> Iterator[Case]:
    for value in (1e-6, 4e-6, 1.6e-5, 6.4e-5):
        yield Case(PAIRS[0], 8, timesteps=1, ridge=value)


def empty() -> Iterator[Case]:
    for numbers, share in itertools.product(PAIRS, (0.0, 0.1, 0.2, 0.4)):
        yield Case(numbers, 8, empty_share=share)


PARTS = {part.__name__: part for part in (rows, ridge, empty)}


class Bench:
    """Cases, each measured once."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        self._held_out: tuple[Any, HeldOut] | None = None

    def measure(self, case: Case) -> Mapping[str, float]:
        key = json.dumps(asdict(case))
        if key not in self.known:
            held_out = self._rows(case)
            settings = {} if case.ridge is None else {"ridge": case.ridge}
            started = time.perf_counter()
            merged = merge_loras(
                self.world.host,
                self.world.merged_concepts(case.numbers, None, 0.0),
                settings=settings,
                calibration=Calibration(
                    samples=case.samples,
                    timesteps=case.timesteps,
                    empty_share=case.empty_share,
                    latent_size=case.latent_size,
                    templates=SEEN,
                    seed=case.seed,
                ),
            )
            seconds = time.perf_counter() - started
            self.known[key] = {**held_out.errors(merged.lora), "seconds": seconds}
            RESULTS.write_text(json.dumps(self.known, indent=1) + "\n")
            print(key, self.known[key], flush=True)
        return self.known[key]

    def _rows(self, case: Case) -> HeldOut:
        key = case.numbers, case.latent_size
        if self._held_out is None or self._held_out[0] != key:
            self._held_out = key, HeldOut(self.world, *key)
        return self._held_out[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    bench = Bench(World())
    for part in parser.parse_args().parts:
        found: dict[str, list[Mapping[str, float]]] = {}
        for case in PARTS[part]():
            found.setdefault(case.name, []).append(bench.measure(case))
        print(f"\n{part}")
        for name, errors in found.items():
            means = {n: fmean(some[n] for some in errors) for n in errors[0]}
            print(name, {n: round(value, 4) for n, value in means.items()})


if __name__ == "__main__":
    main()
