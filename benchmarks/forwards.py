"""How many rows a merge wants: the held-out error by prompts, timesteps and tokens of a picture.

``python benchmarks/forwards.py [tuning|empty|ridge|reported …]`` merges on the toybox at latents of
8, 16 and 24 (64, 256 and 576 tokens at its widest sites) and prints the held-out errors, see
:mod:`held_out`; they come into ``benchmarks/results/forwards.json`` as they are measured, and what
stands there is not measured again. The toybox was trained at 8: at 16 and 24 it fills the picture
with more and stranger things than a prompt names. Rules were chosen on the sets of ``tuning``,
``empty`` and ``ridge``; those of ``reported`` are others, as in ``quality.py``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from held_out import SEEN, HeldOut
from toybox_world import World

from iteris_core import Calibration, merge_loras

RESULTS = Path(__file__).parent / "results" / "forwards.json"
TUNING: dict[int, Sequence[tuple[int, ...]]] = {
    8: ((3, 5), (8, 9), (2, 3, 5, 7, 9)),
    16: ((3, 5), (2, 3, 5, 7, 9)),
    24: ((3, 5),),
}
REPORTED: dict[int, Sequence[tuple[int, ...]]] = {
    8: ((1, 4), (2, 6), (1, 4, 6, 8, 10)),
    16: ((1, 4), (1, 4, 6, 8, 10)),
    24: ((1, 4),),
}
GRID = ((50, 4), (50, 2), (50, 1), (25, 4), (25, 2), (25, 1), (12, 4), (12, 2))


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


def tuning() -> Iterator[Case]:
    for size, sets in TUNING.items():
        for numbers, (samples, timesteps) in itertools.product(sets, GRID):
            yield Case(numbers, size, samples, timesteps)


def empty() -> Iterator[Case]:
    for numbers, share in itertools.product(TUNING[8], (0.0, 0.1, 0.2, 0.3, 0.4)):
        for samples, timesteps in ((50, 4), (50, 1)):
            yield Case(numbers, 8, samples, timesteps, share)


def ridge() -> Iterator[Case]:
    for size in (8, 16):
        for numbers, pair in itertools.product(TUNING[size][:2], ((50, 1), (25, 2), (12, 4))):
            for value in (1e-6, 4e-6, 1.6e-5, 6.4e-5):
                yield Case(numbers, size, *pair, ridge=value)


def reported() -> Iterator[Case]:
    for size, sets in REPORTED.items():
        for numbers, pair, seed in itertools.product(sets, GRID[:3], (0, 1)):
            yield Case(numbers, size, *pair, seed=seed)


PARTS = {part.__name__: part for part in (tuning, empty, ridge, reported)}


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
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=PARTS)
    bench = Bench(World())
    for part in parser.parse_args().parts:
        rows: dict[str, list[Mapping[str, float]]] = {}
        for case in PARTS[part]():
            rows.setdefault(case.name, []).append(bench.measure(case))
        print(f"\n{part}")
        for name, errors in rows.items():
            means = {n: fmean(some[n] for some in errors) for n in errors[0]}
            print(name, {n: round(value, 4) for n, value in means.items()})


if __name__ == "__main__":
    main()
