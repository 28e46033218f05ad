"""Draws images with LoRA files in a separate process, with diffusers alone.

``python render.py JOBS.json`` reads ``{"base", "guidance", "steps", "jobs": [{"loras":
[[path, weight], …], "pictures": [{"prompt", "seed", "file"}, …]}, …]}`` and writes the files.
It imports nothing from this project, so it draws what any script gets from these files.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

BATCH = 32


def main(jobs_file: str) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from diffusers import StableDiffusionPipeline

    plan = json.loads(Path(jobs_file).read_text(encoding="utf-8"))
    pipe = StableDiffusionPipeline.from_pretrained(plan["base"], use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    total = sum(len(job["pictures"]) for job in plan["jobs"])
    done = 0
    for job in plan["jobs"]:
        names = [f"lora{index}" for index in range(len(job["loras"]))]
        for name, (path, _) in zip(names, job["loras"], strict=True):
            pipe.load_lora_weights(path, adapter_name=name)
        if names:
            pipe.set_adapters(names, [weight for _, weight in job["loras"]])
        for start in range(0, len(job["pictures"]), BATCH):
            some = job["pictures"][start : start + BATCH]
            images = pipe(
                [picture["prompt"] for picture in some],
                num_inference_steps=plan["steps"],
                guidance_scale=plan["guidance"],
                generator=[torch.Generator().manual_seed(p["seed"]) for p in some],
            ).images
            for picture, image in zip(some, images, strict=True):
                Path(picture["file"]).parent.mkdir(parents=True, exist_ok=True)
                image.save(picture["file"])
            done += len(some)
            sys.stdout.write(f"{done}/{total}\n")
            sys.stdout.flush()
        if names:
            pipe.unload_lora_weights()


if __name__ == "__main__":
    main(sys.argv[1])
