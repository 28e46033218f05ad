"""How a trained adapter is saved: the layout of diffusers, or kohya's with alpha tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import nn

TOLERANCE = 0.02


def adapter_layers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights as float16, in peft's names."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {k: v.detach().half().contiguous() for k, v in state.items()}


def save_diffusers(
    pipeline: StableDiffusionPipeline, configs: dict[str, LoraConfig], path: Path
) -> None:
    """As diffusers saves: weights in peft's names, alpha in the file's metadata only."""
    unet, text = adapter_layers(pipeline.unet), adapter_layers(pipeline.text_encoder)
    StableDiffusionPipeline.save_lora_weights(
        path.parent,
        unet_lora_layers=unet,
        text_encoder_lora_layers=convert_state_dict_to_diffusers(text),
        unet_lora_adapter_metadata=adapter_metadata(configs["unet"]),
        text_encoder_lora_adapter_metadata=adapter_metadata(configs["text_encoder"]),
        weight_name=path.name,
    )


def adapter_metadata(config: LoraConfig) -> dict:
    """The part of a configuration that diffusers stores in a file's metadata."""
    kept = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora")
    values = {k: getattr(config, k) for k in kept}
    targets = config.target_modules
    return {**values, "target_modules": targets if isinstance(targets, str) else sorted(targets)}


def save_kohya(
    pipeline: StableDiffusionPipeline, rank: int, alpha: float, path: Path, name: str
) -> None:
    """As kohya's sd-scripts saves: one flat name per layer, with its alpha as a tensor."""
    tensors = {}
    unet, text = adapter_layers(pipeline.unet), adapter_layers(pipeline.text_encoder)
    for prefix, state in (("lora_unet_", unet), ("lora_te_text_model_", text)):
        for key, value in state.items():
            module, _, part = key.removeprefix("text_model.").rpartition(".lora_")
            flat = prefix + module.replace(".", "_")
            role = {"A.weight": "lora_down", "B.weight": "lora_up"}[part]
            tensors[f"{flat}.{role}.weight"] = value
            tensors[f"{flat}.alpha"] = torch.tensor(float(alpha), dtype=torch.float16)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(alpha)),
        "ss_output_name": name,
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
    }
    save_file(tensors, path, metadata=metadata)


def note_words(path: Path, entry: dict[str, Any]) -> None:
    """Write the concept's words and the base's name into the metadata of the file at `path`; its
    tensors stay as they are."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    words = entry["token"], entry.get("class_word", "")
    metadata["modelspec.trigger_phrase"] = " ".join(words).strip()
    metadata["ss_sd_model_name"] = "toybox"
    save_file(load(path.read_bytes()), path, metadata=metadata)


@torch.no_grad()
def verify(
    trained: StableDiffusionPipeline, fresh: StableDiffusionPipeline, path: Path, prompt: str
) -> float:
    """Load `path` into `fresh` and compare both models' outputs with those of `trained`.

    Returns the largest difference relative to the outputs' size. Raises ValueError where it exceeds
    `TOLERANCE` (the files are float16) or a layer is missing.
    """
    fresh.load_lora_weights(str(path))
    counts = [
        sum(hasattr(m, "lora_A") for model in (p.unet, p.text_encoder) for m in model.modules())
        for p in (trained, fresh)
    ]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    outputs = []
    for pipeline in (trained, fresh):
        tokens = pipeline.tokenizer([prompt], padding="max_length", return_tensors="pt").input_ids
        context = pipeline.text_encoder(tokens)[0]
        outputs.append((context, pipeline.unet(noise, 500, context, return_dict=False)[0]))
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*outputs, strict=True))
    if counts[0] != counts[1] or worst > TOLERANCE:
        raise ValueError(
            f"{path} does not give back what was trained: {counts[1]} of "
            f"{counts[0]} layers, outputs differ by {worst:.3g}"
        )
    return worst
