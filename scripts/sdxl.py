"""Several SDXL LoRAs in one file, which loads everywhere that reads kohya's layout.

    python scripts/sdxl.py stabilityai/stable-diffusion-xl-base-1.0 -o both.safetensors \\
        --lora cat.safetensors:sks:cat --lora dog.safetensors:zwx:dog \\
        --picture "a sks cat and a zwx dog on the beach"

A LoRA is FILE:TRIGGER:CLASS. The picture of the merged LoRA lies beside the file, as .png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="a folder of diffusers or a name on the hub")
    parser.add_argument("--lora", action="append", required=True, metavar="FILE:TRIGGER:CLASS")
    parser.add_argument("--samples", type=int, default=25, help="prompts a LoRA")
    parser.add_argument(
        "--latent-size", type=int, default=64, help="128 is SDXL's own; 64 is quicker"
    )
    parser.add_argument("--picture", metavar="PROMPT")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipeline = StableDiffusionXLPipeline.from_pretrained(arguments.base, torch_dtype=dtype)
    pipeline.to(device)
    host = DiffusersHost(pipeline)
    concepts = []
    for text in arguments.lora:
        file, trigger, word = text.rsplit(":", 2)
        concepts.append(Concept(host.read_lora(file), trigger=trigger, class_word=word))
    calibration = Calibration(samples=arguments.samples, latent_size=arguments.latent_size)
    result = merge_loras(host, concepts, calibration=calibration)
    print(result.report.summary())
    result.save(arguments.output)

    if arguments.picture:
        pipeline.load_lora_weights(arguments.output)
        generator = torch.Generator().manual_seed(0)
        picture = pipeline(arguments.picture, generator=generator).images[0]
        picture.save(arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
