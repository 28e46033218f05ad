"""The step `pivotal`: two concepts by pivotal tuning, a learned embedding together with a LoRA."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..pipeline import load
from .base import use_plain_attention
from .lora_files import verify
from .loras import (
    adapter_parameters,
    add_adapters,
    fit,
    note_seconds,
    prompts_of,
    rate,
    read_seconds,
    save,
    world,
    write_references,
)

log = logging.getLogger(__name__)
EMBEDDING_STEPS, EMBEDDING_PEAK = 150, 1e-2


def train_one(
    entry: dict[str, Any], index: int, weights: Path, references: Path, folder: Path
) -> float:
    """Learn the token's embedding, then embedding and LoRA together; returns seconds taken."""
    began = time.time()
    token = entry["token"]
    name = token.strip("<>")
    scenes, pictures = write_references(entry, references / name, 900 + 10 * index)
    prompts = prompts_of(entry, scenes)
    torch.manual_seed(91 + index)
    pipeline = load(weights / "base")
    use_plain_attention(pipeline.unet, pipeline.text_encoder)
    pipeline.tokenizer.add_tokens([token])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    row = pipeline.tokenizer.convert_tokens_to_ids(token)
    start = pipeline.tokenizer.convert_tokens_to_ids(entry["class_word"] + "</w>")
    table = pipeline.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[row] = table[start]
    configs = add_adapters(pipeline, entry["alpha"])
    adapters = adapter_parameters(pipeline)
    table.requires_grad_(True)

    def keep_rows() -> None:
        """Train only the new token's row."""
        table.grad[:row].zero_()

    fit(
        pipeline,
        pictures,
        prompts,
        [{"params": [table], "lr": EMBEDDING_PEAK}],
        EMBEDDING_STEPS,
        91 + index,
        keep_rows,
    )
    groups = [
        {"params": [table], "lr": EMBEDDING_PEAK / 4},
        {"params": adapters, "lr": rate(entry["alpha"])},
    ]
    loss = fit(pipeline, pictures, prompts, groups, entry["steps"], 92 + index, keep_rows)
    save(pipeline, configs, entry, folder / f"{name}.safetensors")
    save_file({token: table[row].detach().half().clone()}, folder / f"{name}_embedding.safetensors")
    fresh = load(weights / "base")
    fresh.load_textual_inversion(str(folder / f"{name}_embedding.safetensors"), token=token)
    differ = verify(
        pipeline, fresh, folder / f"{name}.safetensors", f"a {token} {entry['class_word']}"
    )
    log.info(
        "pivotal %s: loss %.4f, reloaded to %.1e, %.0f s", name, loss, differ, time.time() - began
    )
    return time.time() - began


def train(work: Path, weights: Path, only: Sequence[str] = ()) -> dict:
    """Train every pivotal concept (or `only` those named) that has no file yet."""
    for index, entry in enumerate(world()["pivotal_concepts"]):
        name = entry["token"].strip("<>")
        done = (weights / "loras" / f"{name}_embedding.safetensors").exists()
        if not done and (not only or name in only):
            references = weights.parent / "references"
            note_seconds(
                work, name, train_one(entry, index, weights, references, weights / "loras")
            )
    return {"lora_seconds": read_seconds(work)}
