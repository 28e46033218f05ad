"""Random LoRA files for any pipeline, as peft and diffusers write them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

PARTS = re.compile(r"attn|attention|\.ff|ffn|feed_forward|mlp|\.fc[12]$", re.IGNORECASE)


def loaded_parts(pipeline: Any) -> list[str]:
    """The components that the pipeline's loader reads changes of: of text encoders only CLIP."""
    named = {name: getattr(pipeline, name, None) for name in type(pipeline)._lora_loadable_modules}
    return [
        name for name, part in named.items()
        if isinstance(part, nn.Module)
        and (not name.startswith("text") or type(part).__name__.startswith("CLIPText"))
    ]  # fmt: skip


def lora_tensors(pipeline: Any, seed: int = 1, rank: int = 2, size: float = 1.0):
    """Of every linear layer of attention and feed-forward, in peft's layout."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for component in loaded_parts(pipeline):
        if component == "transformer_2":
            continue
        for name, module in getattr(pipeline, component).named_modules():
            if not isinstance(module, nn.Linear) or not PARTS.search(f".{name}"):
                continue
            if component.startswith("text_encoder") and name.startswith("encoder."):
                name = f"text_model.{name}"
            wide, high = module.in_features, module.out_features
            down = torch.randn(rank, wide, generator=generator) / wide**0.5
            up = torch.randn(high, rank, generator=generator) * size / rank**0.5
            tensors[f"{component}.{name}.lora_A.weight"] = down
            tensors[f"{component}.{name}.lora_B.weight"] = up
    return tensors


def write_lora(path: str | Path, pipeline: Any, seed: int = 1, rank: int = 2) -> Path:
    """A random LoRA of the pipeline's denoiser and of the text encoders that it is loaded with."""
    save_file(lora_tensors(pipeline, seed, rank), path)
    return Path(path)
