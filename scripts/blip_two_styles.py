"""Two caption styles in one BLIP, steered by the prompt, as in the paper.

    python scripts/blip_two_styles.py -o merged --base Salesforce/blip-image-captioning-base \\
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
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoProcessor, BlipForConditionalGeneration  # noqa: E402

from iteris_core import Concept, merge_loras  # noqa: E402
from iteris_core.hosts.transformers import TransformersHost  # noqa: E402
from iteris_core.lora_files.peft_folder import write_adapter  # noqa: E402
from toybox.draw import BACKGROUNDS, draw, place_one, random_thing  # noqa: E402

FOLDER = ROOT / "benchmarks" / "data" / "captions"
STYLES = ("praising", "grumbling")
WORDS = (FOLDER / "words.txt").read_text(encoding="utf-8").splitlines()
_, BEGIN, END = range(3)


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


def prompted(style: str, count: int) -> torch.Tensor:
    """The tokens of a style's prompt; BLIP drops the last one."""
    words = [WORDS.index(word) for word in f"a {style} caption :".split()]
    return torch.tensor([[BEGIN, *words, END]] * count)


def pictures(count: int, seed: int) -> torch.Tensor:
    """Of the toybox: (count, 3, 64, 64) in [-1, 1]."""
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(count):
        background = str(rng.choice(list(BACKGROUNDS)))
        scene = place_one(random_thing(rng, background, patterned=0.7), background, rng)
        drawn.append(np.asarray(draw(scene, None), dtype=np.float32))
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1


def local() -> tuple[TransformersHost, list]:
    model = BlipForConditionalGeneration.from_pretrained(FOLDER / "base", dtype=torch.float32)
    host = TransformersHost(model.eval(), generate={"max_new_tokens": 28})
    concepts = []
    for style in STYLES:
        ids = prompted(style, 50)
        batch = {
            "pixel_values": pictures(50, len(concepts)),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }
        concepts.append(Concept(host.read_lora(FOLDER / style), trigger=style, inputs=[batch]))
    return host, concepts


@torch.inference_mode()
def captioned(model: BlipForConditionalGeneration, image: torch.Tensor, style: str) -> str:
    ids = prompted(style, 1)
    options = {"max_new_tokens": 28, "do_sample": False, "num_beams": 1}
    found = model.generate(
        pixel_values=image, input_ids=ids, attention_mask=torch.ones_like(ids), **options
    )
    said = found[0, ids.shape[1] - 1 :].tolist()
    return " ".join(WORDS[i] for i in said[: [*said, END].index(END)] if i > END)


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
        for style in STYLES:
            print(f"{style}: {captioned(merged, pictures(1, 2), style)}")


if __name__ == "__main__":
    main()
