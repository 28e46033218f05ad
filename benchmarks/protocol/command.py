"""The command of a world's tables, and the one of its search for settings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outputs import BUILD, QUICK, result_file, write

from .plan import METHODS, OURS, REGIMES, REPLICATES, Unit, regimes_of, units
from .runs import Runs
from .settings import Chosen
from .table import Table
from .world import World


@dataclass(frozen=True)
class Tables:
    """``name``.json is made of ``name``_runs.jsonl; QUICK=1 takes few methods and sizes and no
    styles, and has its own of both."""

    name: str
    world: Callable[[], World]
    chosen: Chosen
    quick_methods: Sequence[str] = ("single", "base", "iteris", "ssr")
    quick_sizes: Sequence[int] = (2, 5)

    def main(self, description: str | None) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument(
            "--seconds", type=float, default=float("inf"), help="begin nothing after these"
        )
        parser.add_argument("--methods", type=_words, default=self.quick_methods if QUICK else ())
        parser.add_argument("--sizes", type=_words, default=self.quick_sizes if QUICK else ())
        parser.add_argument("--regimes", type=_words, default=tuple(REGIMES))
        parser.add_argument("--replicates", type=int, default=1 if QUICK else REPLICATES)
        asked = parser.parse_args()
        world = self.world()
        runs = Runs(world, result_file(f"{self.name}_runs.jsonl"))
        wanted = units(
            world.subjects,
            () if QUICK else world.styles,
            [int(size) for size in asked.sizes] or world.sizes,
            self.chosen,
            methods=asked.methods or METHODS,
            regimes=asked.regimes,
            replicates=asked.replicates,
            trained=world.trained,
        )
        whole = runs.run(wanted, asked.seconds)
        data = self.data(world, runs)
        write(result_file(f"{self.name}.json"), data)
        ended = "" if whole else ", stopped by --seconds"
        print(f"{data['measured']} of {data['planned']} measured{ended}")

    def data(self, world: World, runs: Runs) -> dict[str, Any]:
        """What is known so far, with how much of the plan that is."""
        every = list(
            units(world.subjects, world.styles, world.sizes, self.chosen, trained=world.trained)
        )
        done = [unit for unit in every if unit.key in runs.known]
        return {
            "default": OURS,
            "concepts": len(world.subjects),
            "collapse_below": world.collapse_below[0],
            "replicates": len({unit.replicate for unit in done}),
            "measured": len(done),
            "planned": len(every),
            "settings": self._settings(world, done),
            **Table(every, runs.known, world.collapse_below).figures(),
        }

    def _settings(self, world: World, done: Sequence[Unit]) -> dict[str, Mapping[str, Any]]:
        """method → regime → how many → settings, and whether they were searched for there."""
        return {
            method: {
                regime: {
                    str(size): {
                        "settings": self.chosen(method, size, regime),
                        "searched": self.chosen.known(method, size, regime),
                    }
                    for size in world.sizes
                }
                for regime in regimes_of(method, tuple(REGIMES))
            }
            for method in dict.fromkeys(unit.method for unit in done)
            if any(self.chosen(method, size, regime) for size in world.sizes for regime in REGIMES)
        }


def search_settings(
    name: str, world: Callable[[], World], chosen: Chosen, description: str | None
) -> None:
    """The command of a search on ``world``, which has none of the concepts that are reported."""
    from .tuning import Tuning

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing after these"
    )
    parser.add_argument("--methods", type=_words, default=(), help="all that have a grid")
    parser.add_argument("--regimes", type=_words, default=tuple(REGIMES))
    asked = parser.parse_args()
    tuning = Tuning(Runs(world(), BUILD / f"{name}_tuning.jsonl"), chosen, asked.seconds)
    whole = tuning.search(asked.methods, asked.regimes)
    print("all settings are known" if whole else "stopped by --seconds")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)
