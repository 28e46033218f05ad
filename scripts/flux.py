"""Several LoRAs for FLUX.1 in one file, with the model's parts on the GPU one at a time.

    python scripts/flux.py black-forest-labs/FLUX.1-dev -o both.safetensors \\
        --lora cat.safetensors:sks:cat --lora dog.safetensors:zwx:dog

A LoRA is FILE:TRIGGER:CLASS, trained on the transformer, CLIP, or both. Moments of the widest sites
(15360 inputs) take 1 GiB for each LoRA.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="a folder of diffusers or a name on the hub")
    parser.add_argument("--lora", action="append", required=True, metavar="FILE:TRIGGER:CLASS")
    parser.add_argument("--samples", type=int, default=25, help="prompts a LoRA")
    parser.add_argument("--timesteps", type=int, default=2, help="latents a prompt")
    parser.add_argument("--latent-size", type=int, default=64, help="128 is FLUX's own")
    parser.add_argument("--rank", type=int, help="of the result; the sum of ranks by default")
    parser.add_argument("--layout", default="kohya", choices=["kohya", "peft"])
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()

    pipeline = FluxPipeline.from_pretrained(arguments.base, torch_dtype=torch.bfloat16)
    if torch.cuda.is_available():
        pipeline.enable_model_cpu_offload()
    host = DiffusersHost(pipeline)
    concepts = []
    for text in arguments.lora:
        file, trigger, word = text.rsplit(":", 2)
        concepts.append(Concept(host.read_lora(file), trigger=trigger, class_word=word))
    result = merge_loras(
        host,
        concepts,
        settings={"rank": arguments.rank, "micro_batch": 8},
        calibration=Calibration(
            samples=arguments.samples,
            timesteps=arguments.timesteps,
            latent_size=arguments.latent_size,
        ),
        on_progress=lambda progress: print(f"\r{progress}\033[K", end=""),
    )
    print(result.report.summary())
    result.save(arguments.output, layout=arguments.layout, dtype="bfloat16")


if __name__ == "__main__":
    main()
