"""`python -m toybox.train`: retrains every weight of the toybox, step by step."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
from pathlib import Path

STEPS = {  # step: module and function
    "ae": ("autoencoder", "train"),
    "judge": ("judge", "train"),
    "clip": ("clip", "train"),
    "latents": ("latents", "train"),
    "base": ("base", "train"),
    "decoder": ("autoencoder", "train_decoder"),
    "loras": ("loras", "train"),
    "pivotal": ("pivotal", "train"),
    "evaluate": ("evaluate", "train"),
}


def main() -> None:
    """Parse the command line and run the named steps in order."""
    parser = argparse.ArgumentParser(prog="python -m toybox.train", description=__doc__)
    parser.add_argument("--step", choices=[*STEPS, "all"], default="all")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/toybox"),
        help="where checkpoints and the log of times go",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path(__file__).parents[1] / "weights",
        help="where the finished files go",
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        metavar="NAME",
        help="of the steps loras and pivotal, these concepts only",
    )
    parser.add_argument(
        "--world",
        type=Path,
        help="of the step loras: a folder with another world.json, for concepts of its own",
    )
    parser.add_argument(
        "--again",
        type=int,
        default=0,
        help="of the step loras: the number of a further training from other seeds",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    import torch

    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for step in STEPS if arguments.step == "all" else [arguments.step]:
        name, function = STEPS[step]
        module = importlib.import_module(f".{name}", __package__)
        more = {"only": arguments.only} if step in ("loras", "pivotal") else {}
        if step == "loras":
            more |= {"root": arguments.world, "again": arguments.again}
        figures = getattr(module, function)(arguments.work, arguments.weights, **more)
        (arguments.work / f"{step}.json").write_text(json.dumps(figures, indent=1))
        logging.getLogger(__name__).info("%s: %s", step, figures)


if __name__ == "__main__":
    main()
