"""Tells the released architectures apart, by a loaded model's sites or a LoRA file's keys."""

from __future__ import annotations

from collections.abc import Mapping

from .record import said_base
from .row_mapping import Shapes


def kind_of_sites(shapes: Shapes) -> str | None:
    """The architecture's name for a loaded model's sites. Only SDXL has a second text encoder or
    added sizes, and SD 2.x reads text embeddings of width 1024."""
    if any(site.startswith("transformer.single_transformer_blocks.") for site in shapes):
        return "flux"
    if any(site.startswith("transformer.") and ".norm1_context." in site for site in shapes):
        return "sd3"
    if not any(site.startswith("unet.") for site in shapes):
        return None
    if any(site.startswith(("unet.add_embedding.", "text_encoder_2.")) for site in shapes):
        return "sdxl"
    widths = [shape[1] for site, shape in shapes.items() if site.endswith(".attn2.to_k")]
    return "sd2" if widths[:1] == [1024] else "sd1"


def kind_of_file(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
    """The architecture's name for a LoRA file, by its blocks, its metadata or its width."""
    keys, said = " ".join(shapes), said_base(metadata)

    def has(*marks: str) -> bool:
        return any(mark in keys for mark in marks)

    single, double = has("single_blocks", "single_transformer_blocks"), has("double_blocks")
    transformer = any(key.startswith(("transformer.", "lora_transformer_")) for key in shapes)
    unet = has("unet", "down_blocks", "input_blocks", "lora_te")
    unet = unet and not (single or double or transformer or has("joint_blocks"))
    width = _key_width(shapes, "attn2")
    deep = ("input_blocks_4_1_transformer_blocks_1", "attentions_0_transformer_blocks_1")
    added = ("text_encoder_2.", "lora_te2_", "label_emb", "add_embedding")
    if unet and (has(*added, *deep) or width == 2048 or "xl" in said):
        return "sdxl"
    if not single and (has("joint_blocks") or "stable-diffusion-3" in said or "sd3" in said):
        return "sd3"
    if unet:
        return "sd2" if width == 1024 else "sd1"
    if single or double or (transformer and ("flux" in said or _key_width(shapes, "attn") == 3072)):
        return "flux"
    return "sd3" if transformer else None


def _key_width(shapes: Shapes, part: str) -> int | None:
    """Number of inputs of the first key projection in a file whose name contains ``part``."""
    for key, shape in shapes.items():
        down = any(mark in key for mark in ("lora_A", "lora_down", ".down."))
        if part in key and "to_k" in key and down and len(shape) > 1:
            return shape[1]
    return None
