"""Two caption styles in one BLIP, steered by the prompt, as in the paper.

    python examples/blip_two_styles.py -o merged --base Salesforce/blip-image-captioning-base \\
        --style adapters/positive:"a positive caption of" --style adapters/negative:"a negative \\
        caption of" --pictures photos/

Without ``--base`` it merges the two styles of the small BLIP in benchmarks/data/captions and
captions one of the toybox's pictures both ways.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import caption_world as world  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoProcessor, BlipForConditionalGeneration  # noqa: E402

from iteris_core import Concept, merge_loras  # noqa: E402
from iteris_core.hosts.transformers import TransformersHost  # noqa: E402
from iteris_core.lora_files.peft_folder import write_adapter  # noqa: E402


def from_hub(base: str, styles: list[str], pictures: Path) -> tuple[TransformersHost, list]:
    processor = AutoProcessor.from_pretrained(base)
    model = BlipForConditionalGeneration.from_pretrained(base).eval()
    host = TransformersHost(model, generate={"max_new_tokens": 30})
    images = [Image.open(file).convert("RGB") for file in sorted(pictures.iterdir())[:50]]
    concepts = []
    for text in styles:
        folder, _, prompt = text.partition(":")
        batch = processor(images, [prompt] * len(images), return_tensors="pt", padding=True)
        concepts.append(Concept(host.read_lora(folder), trigger=prompt, inputs=[batch]))
    return host, concepts


def local() -> tuple[TransformersHost, list]:
    host = TransformersHost(world.load_model(), generate={"max_new_tokens": 28})
    rng = np.random.default_rng(0)
    concepts = []
    for style in world.STYLES:
        images = world.pixels([world.random_picture(rng) for _ in range(50)])
        ids = torch.tensor([[*world.prompt_ids(style), world.END]] * len(images))
        batch = {"pixel_values": images, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        lora = host.read_lora(world.FOLDER / style)
        concepts.append(Concept(lora, trigger=style, inputs=[batch]))
    return host, concepts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base")
    parser.add_argument("--style", action="append", metavar="FOLDER:PROMPT")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.base:
        host, concepts = from_hub(arguments.base, arguments.style, arguments.pictures)
    else:
        host, concepts = local()
    result = merge_loras(host, concepts)
    print(result.report.summary())
    write_adapter(result.lora, arguments.output, base=arguments.base or "")
    if not arguments.base:
        merged = PeftModel.from_pretrained(host.model, arguments.output).get_base_model()
        image = world.pixels([world.random_picture(np.random.default_rng(1))])
        for style in world.STYLES:
            print(f"{style}: {world.generate(merged, image, style)[0]}")


if __name__ == "__main__":
    main()
