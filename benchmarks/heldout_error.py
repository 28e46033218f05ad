"""The held-out error of merges on the toybox, one thing at a time, see :mod:`held_out`.

``python benchmarks/heldout_error.py [PART …]`` writes ``benchmarks/results/heldout_error.json`` as
the figures come; what stands there is not measured again. Sets are two pairs and five concepts that
the quality suite does not report, and all ten. A case has the defaults and 50 prompts at four
timesteps but for what it says. Merges have 25 templates, so that 50 prompts are each of them twice;
the other templates are those of the rows that are held out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from held_out import SEEN, HeldOut
from heldout_cases import LATENTS, PARTS, Case, table
from outputs import read, result_file, write
from toybox_world import World

from iteris_core import Calibration, merge_loras
from iteris_core.solve.choose import POLICY, Policy

FILE = result_file("heldout_error.json")
POLICIES = {
    "": POLICY,
    # At every site, where the toybox's own are too small for it.
    "few directions": Policy(small_target=0, directions_gain=0.0),
}


class Bench:
    """Cases, each measured once."""

    def __init__(self) -> None:
        self.known = read(FILE)
        self._world: World | None = None
        self._held_out: tuple[Any, HeldOut] | None = None

    @property
    def world(self) -> World:
        if self._world is None:
            self._world = World()
        return self._world

    def measure(self, case: Case) -> Mapping[str, float]:
        if case.key not in self.known:
            calibration = {"latent_size": LATENTS, "templates": SEEN, **case.calibration}
            held_out = self._rows(case.numbers, calibration["latent_size"])
            merged = merge_loras(
                self.world.host,
                self.world.merged_concepts(case.numbers, None, 0.0),
                settings=case.settings,
                calibration=Calibration(**calibration),
                policy=POLICIES[case.policy],
            )
            self.known[case.key] = held_out.errors(merged.lora)
            write(FILE, {**read(FILE), **self.known})
            print(case.key, self.known[case.key], flush=True)
        return self.known[case.key]

    def _rows(self, numbers: tuple[int, ...], latent_size: int) -> HeldOut:
        key = numbers, latent_size
        if self._held_out is None or self._held_out[0] != key:
            self._held_out = key, HeldOut(self.world, *key)
        return self._held_out[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--again", action="store_true", help="measure what is known anew")
    arguments = parser.parse_args()
    bench = Bench()
    for part in arguments.parts:
        if arguments.again:
            for case in PARTS[part]():
                bench.known.pop(case.key, None)
        for case in PARTS[part]():
            bench.measure(case)
        print(f"\n{part}: pairs, five, ten")
        for said, errors in table(bench.known, part):
            print(f"{said:40}", " ".join(f"{error:.4f}" for error in errors))


if __name__ == "__main__":
    main()
