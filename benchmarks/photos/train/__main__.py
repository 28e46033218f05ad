"""``python -m photos.train`` in ``benchmarks/``: makes the world of photographs, step by step."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
from pathlib import Path

import torch

from .. import SMALL, WEIGHTS

STEPS = ("things", "autoencoder", "references", "base", "loras")
SMALL_STEPS = STEPS[3:]
"""A smaller base has the other's autoencoder, and features know no base."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m photos.train", description=__doc__)
    parser.add_argument("--step", choices=[*STEPS, "all"], default="all")
    parser.add_argument("--work", type=Path, default=Path("../build/photos"), help="checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="the base of half the width")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(asked.threads)
    weights = SMALL if asked.small else WEIGHTS
    weights.mkdir(parents=True, exist_ok=True)
    every = SMALL_STEPS if asked.small else STEPS
    for step in every if asked.step == "all" else [asked.step]:
        width = {"width": 48 if asked.small else 96} if step == "base" else {}
        train = importlib.import_module(f".{step}", __package__).train
        found = train(asked.work, weights, **width)
        path = weights / "train.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**known, **found}, indent=1) + "\n", encoding="utf-8")
        logging.getLogger(__name__).info("%s: %s", step, found)


if __name__ == "__main__":
    main()
