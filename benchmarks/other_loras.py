"""LoRAs of other ranks and of another trainer for the first six of the reported concepts.

``python benchmarks/other_loras.py rank_2`` trains them into ``build/others/rank_2``, in one to two
minutes each, and goes on where it stopped. ``python benchmarks/unseen.py --world rank_2`` measures
merges of them. The reported LoRAs have rank 8, by peft on the projections of attention.

``rank_2``, ``rank_64``: as diffusers' DreamBooth script trains, with ``lora_alpha`` the rank.
``kohya``: rank 16 with alpha 8 by the network of kohya's sd-scripts, which adds the feed-forward
layers and the input and output projections of each transformer. ``KOHYA_PATH`` is a checkout of
github.com/kohya-ss/sd-scripts, of which ``networks/lora.py`` is used.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import reported_concepts
import torch
from outputs import BUILD
from safetensors.torch import save_file

import toybox
from toybox.pipeline import load
from toybox.train.base import use_plain_attention
from toybox.train.lora_files import save_diffusers
from toybox.train.loras import (
    RANK,
    adapter_parameters,
    add_adapters,
    fit,
    prompts_of,
    rate,
    write_references,
)

CONCEPTS = 6
Parameters = Sequence[torch.nn.Parameter]
Trainer = Callable[[Any], tuple[Parameters, float, Callable[[Path], None]]]
"""A pipeline → what is trained on it, its learning rate, and what saves it."""


def by_peft(pipeline: Any, rank: int) -> tuple[Parameters, float, Callable[[Path], None]]:
    configs = add_adapters(pipeline, rank, rank)
    lr = rate(RANK) * min(1.0, RANK / rank) ** 0.5
    return adapter_parameters(pipeline), lr, partial(save_diffusers, pipeline, configs)


def by_kohya(pipeline: Any, rank: int = 16) -> tuple[Parameters, float, Callable[[Path], None]]:
    network = _kohya().LoRANetwork(pipeline.text_encoder, pipeline.unet, 1.0, rank, rank / 2)
    pipeline.unet.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    network.apply_to(pipeline.text_encoder, pipeline.unet)

    def save(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            name.replace("lora_te_encoder", "lora_te_text_model_encoder"): value.half()
            for name, value in network.state_dict().items()
        }
        said = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank)}
        save_file(state, path, {**said, "ss_network_alpha": str(rank / 2)})

    return list(network.parameters()), rate(RANK), save


def _kohya() -> Any:
    """``networks.lora`` of the checkout, whose own helpers are not needed for it."""
    if "KOHYA_PATH" not in os.environ:
        raise SystemExit("KOHYA_PATH names no checkout of sd-scripts.")
    sys.path.insert(0, os.environ["KOHYA_PATH"])
    for name, has in (
        ("library.utils", {"setup_logging": lambda *_, **__: None}),
        ("library.sdxl_original_unet", {"SdxlUNet2DConditionModel": object}),
    ):
        sys.modules[name] = SimpleNamespace(**has)  # type: ignore[assignment]
    return importlib.import_module("networks.lora")


KINDS: Mapping[str, Trainer] = {
    "rank_2": partial(by_peft, rank=2),
    "rank_64": partial(by_peft, rank=64),
    "kohya": by_kohya,
}


def root_of(kind: str) -> Path:
    return BUILD / "others" / kind


def train(kind: str) -> None:
    """Every concept that has no file yet, on the reported pictures and prompts."""
    root, first = root_of(kind), reported_concepts.ROOT
    root.mkdir(parents=True, exist_ok=True)
    said = json.loads((first / "world.json").read_text())
    number_of_first, concepts = said["first_number"], said["concepts"][:CONCEPTS]
    reported_concepts.write_world(root, number_of_first, concepts)
    shutil.copytree(first / "references", root / "references", dirs_exist_ok=True)
    for number, entry in enumerate(concepts, number_of_first):
        path = root / "weights" / "loras" / f"{entry['token']}.safetensors"
        if not path.exists():
            loss = train_one(entry, number, root / "references" / entry["token"], KINDS[kind], path)
            print(f"{path.name}: loss {loss:.4f}", file=sys.stderr, flush=True)


def train_one(
    entry: Mapping[str, Any], number: int, references: Path, trainer: Trainer, path: Path
) -> float:
    """The reported training of a concept with another adapter; returns the last loss."""
    scenes, pictures = write_references(dict(entry), references, 600 + 10 * number)
    torch.manual_seed(61 + number)
    pipeline = load(toybox.BASE)
    use_plain_attention(pipeline.unet, pipeline.text_encoder)
    parameters, lr, save = trainer(pipeline)
    groups = [{"params": parameters, "lr": lr}]
    prompts = prompts_of(dict(entry), scenes)
    loss = fit(pipeline, pictures, prompts, groups, entry["steps"], 61 + number)
    save(path)
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    train(parser.parse_args().kind)
