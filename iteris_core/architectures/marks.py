"""By what LoRA files and pipelines of several architectures are told apart and read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .pieces import Shapes


def said_base(metadata: Mapping[str, str]) -> str:
    """What a file's metadata say of its base model."""
    return metadata.get("ss_base_model_version", "") + metadata.get("modelspec.architecture", "")


def key_width(shapes: Shapes, part: str) -> int | None:
    """Number of inputs of the first key projection in a file whose name has ``part``."""
    for key, shape in shapes.items():
        down = any(mark in key for mark in ("lora_A", "lora_down", ".down."))
        if part in key and "to_k" in key and down and len(shape) > 1:
            return shape[1]
    return None


def reads_all_but_t5(site: str, layout: str) -> bool:
    """diffusers (0.42) reads every site of ours but those of T5, in any layout."""
    return not (site.startswith("text_encoder") and ".encoder.block." in site)


def square_latents(pipeline: Any, side: int | None) -> tuple[int, ...]:
    """(channels, side, side)"""
    config = (pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer).config
    side = side or int(config.sample_size)
    return (int(config.in_channels), side, side)
