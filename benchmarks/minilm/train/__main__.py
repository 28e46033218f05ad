"""`python -m benchmarks.minilm.train`: makes the world's UNet and LoRAs, step by step."""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path

STEPS = ("latents", "base", "loras")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.minilm.train", description=__doc__)
    parser.add_argument("--step", choices=[*STEPS, "all"], default="all")
    parser.add_argument("--work", type=Path, default=Path("build/minilm"), help="for checkpoints")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="end the step base after these"
    )
    parser.add_argument("--only", nargs="*", default=[], metavar="TOKEN", help="these LoRAs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    import torch

    from . import base, latents, loras

    torch.set_num_threads(asked.threads)
    asked.work.mkdir(parents=True, exist_ok=True)
    weights = Path(__file__).parents[1] / "weights"
    if asked.step in ("latents", "all"):
        for index in range(latents.SHARDS):
            latents.shard(asked.work, index)
    if asked.step in ("base", "all"):
        figures = base.train(asked.work, weights, seconds=asked.seconds)
        (asked.work / "base.json").write_text(json.dumps(figures))
        logging.info("base: %s", figures)
    if asked.step in ("loras", "all"):
        logging.info("loras: %s", loras.train(weights, asked.only))


if __name__ == "__main__":
    main()
