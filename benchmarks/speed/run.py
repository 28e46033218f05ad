"""All speed benchmarks, one after the other: ``make bench``, ``QUICK=1`` in about ten minutes.

Each part is added to ``benchmarks/results/speed.json`` as it ends (``build/quick/speed.json`` with
QUICK=1); ``--parts`` runs some of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import floor
import parts
import peers
import torch
import ways

sys.path.append(str(Path(__file__).parents[1]))

from outputs import QUICK, read, result_file, write

FILE = result_file("speed.json")
ROUNDS = 1 if QUICK else int(os.environ.get("ROUNDS", "5"))

PARTS: dict[str, Callable[[], Any]] = {
    "floor toybox": lambda: floor.compare("toybox", ROUNDS),
    "floor sd15": lambda: floor.compare("sd15", ROUNDS),
    "floor sd15-50": lambda: floor.compare("sd15-50", ROUNDS),
    "floor t5": lambda: floor.compare("t5", ROUNDS),
    **{f"parts {name}": partial(parts.compare, name, ROUNDS, quick=QUICK) for name in parts.MODELS},
    "peft": lambda: peers.peft_library(ROUNDS),
    "ways toybox": lambda: ways.compare(ROUNDS, 16),
}
SLOW = ("floor sd15", "floor sd15-50", "floor t5", *(part for part in PARTS if "parts" in part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="", help=", ".join(PARTS))
    chosen = [part for part in parser.parse_args().parts.split(",") if part]
    kept = read(FILE)
    raw: dict[str, Any] = kept.get("raw", {})
    rounds: dict[str, int] = kept.get("rounds", {})
    for part in chosen or PARTS:
        if QUICK and not chosen and part in SLOW:
            continue
        raw[part] = PARTS[part]()
        rounds[part] = ROUNDS
        data = {
            "machine": {
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "processor": platform.processor() or platform.machine(),
                "torch": torch.__version__,
            },
            "rounds": rounds,
            "raw": raw,
        }
        write(FILE, data)
        print(part, json.dumps(raw[part]), flush=True)


if __name__ == "__main__":
    main()
