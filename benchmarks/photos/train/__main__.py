"""``python -m photos.train`` in ``benchmarks/``: makes the world of photographs, step by step."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
from pathlib import Path

import torch

from ..things import ROOT

STEPS = ("things", "autoencoder", "references", "base", "loras")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m photos.train", description=__doc__)
    parser.add_argument("--step", choices=[*STEPS, "all"], default="all")
    parser.add_argument("--work", type=Path, default=Path("../build/photos"), help="checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(asked.threads)
    weights = ROOT / "weights"
    weights.mkdir(exist_ok=True)
    for step in STEPS if asked.step == "all" else [asked.step]:
        found = importlib.import_module(f".{step}", __package__).train(asked.work, weights)
        path = weights / "train.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**known, **found}, indent=1) + "\n", encoding="utf-8")
        logging.getLogger(__name__).info("%s: %s", step, found)


if __name__ == "__main__":
    main()
