"""Two tasks in one FLAN-T5: features while each LoRA writes its answers, as in the paper.

    python scripts/flan_t5_two_tasks.py google/flan-t5-base -o merged \\
        --adapter adapters/mrpc:mrpc.txt --adapter adapters/rte:rte.txt

A text file has one unlabelled input a line, fifty are enough. Without adapters the script makes two
random ones for a small random T5 and merges those, to show that it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from iteris_core import Concept, Lora, LowRank, merge_loras
from iteris_core.hosts.transformers import TransformersHost
from iteris_core.lora_files.peft_folder import write_adapter


def text_batches(tokenizer: Any, file: Path) -> Iterator[Any]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for start in range(0, len(lines), 16):
        some = lines[start : start + 16]
        yield tokenizer(some, padding=True, truncation=True, return_tensors="pt")


def from_hub(base: str, adapters: list[str]) -> tuple[TransformersHost, list[Concept]]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSeq2SeqLM.from_pretrained(base).eval()
    host = TransformersHost(model, generate={"max_new_tokens": 8})
    concepts = []
    for text in adapters:
        folder, _, file = text.partition(":")
        inputs = list(text_batches(tokenizer, Path(file)))
        concepts.append(Concept(host.read_lora(folder), trigger=Path(folder).name, inputs=inputs))
    return host, concepts


def at_random() -> tuple[TransformersHost, list[Concept]]:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    sites = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in ("q", "v")]
    host = TransformersHost(model, generate={"max_new_tokens": 8})
    concepts = []
    for name in ("first", "second"):
        changes = {f"model.{s}": LowRank(torch.randn(64, 4), torch.randn(4, 64)) for s in sites}
        batch = {"input_ids": torch.randint(2, 200, (20, 12))}
        concepts.append(Concept(Lora(changes, name), trigger=name, inputs=[batch]))
    return host, concepts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?", default="google/flan-t5-base")
    parser.add_argument("--adapter", action="append", metavar="FOLDER:TEXTS")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.adapter:
        host, concepts = from_hub(arguments.base, arguments.adapter)
    else:
        host, concepts = at_random()
    result = merge_loras(host, concepts)
    print(result.report.summary())
    write_adapter(result.lora, arguments.output, base=arguments.base)


if __name__ == "__main__":
    main()
