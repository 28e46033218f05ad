"""`python -m benchmarks.emoji.train`: makes the world of emoji, step by step."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
from pathlib import Path

from .place import Place

STEPS = {  # step: module and function
    "pictures": ("place", "fetch"),
    "autoencoder": ("autoencoder", "train"),
    "latents": ("latents", "train"),
    "base": ("base", "train"),
    "finish": ("base", "finish"),
    "decoder": ("autoencoder", "train_decoder"),
    "loras": ("loras", "train"),
    "judges": ("judges", "train"),
    "evaluate": ("evaluate", "train"),
}


def main() -> None:
    """Parse the command line and run the named steps in order."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji.train", description=__doc__)
    parser.add_argument("--step", choices=[*STEPS, "all"], default="all")
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--weights", type=Path, default=Path(__file__).parents[1] / "weights")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these LoRAs only")
    parser.add_argument(
        "--family", choices=("flux", "sd3"), default="flux", help="blocks of the base"
    )
    parser.add_argument("--steps", type=int, help="of base, finish and decoder: how many")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    import torch

    torch.set_num_threads(asked.threads)
    place = Place(asked.work.resolve(), asked.weights.resolve(), tuple(asked.only), asked.family)
    place.work.mkdir(parents=True, exist_ok=True)
    for step in STEPS if asked.step == "all" else [asked.step]:
        name, function = STEPS[step]
        module = importlib.import_module(f".{name}", __package__)
        counted = asked.steps and step in ("base", "finish", "decoder")
        figures = getattr(module, function)(place, **({"steps": asked.steps} if counted else {}))
        place.note(step, figures)
        logging.getLogger(__name__).info("%s: %s", step, figures)


if __name__ == "__main__":
    main()
