"""The known base models, and which of them a loaded model or a LoRA file is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import LoraFileError
from .mmdit import FLUX, SD3
from .record import Architecture, Shapes
from .unet import SD1, SD2, SDXL

ARCHITECTURES: Sequence[Architecture] = (SD1, SD2, SDXL, FLUX, SD3)


def architecture_of_sites(shapes: Shapes) -> Architecture | None:
    """The architecture of a loaded model with these sites; None if it is not known."""
    if any(site.startswith("transformer.single_transformer_blocks.") for site in shapes):
        return FLUX
    if any(site.startswith("transformer.") and ".norm1_context." in site for site in shapes):
        return SD3
    if not any(site.startswith("unet.") for site in shapes):
        return None
    if any(site.startswith(("unet.add_embedding.", "text_encoder_2.")) for site in shapes):
        return SDXL
    widths = [shape[1] for site, shape in shapes.items() if site.endswith(".attn2.to_k")]
    return SD2 if widths[:1] == [1024] else SD1


def architecture_of_file(shapes: Shapes, metadata: Mapping[str, str]) -> Architecture:
    """The architecture for which a LoRA file was made, by its blocks, its metadata or its width;
    ``shapes`` are its tensors', by key. Raises :class:`LoraFileError` if no known one matches."""
    keys = " ".join(shapes)
    # The base model that the metadata name
    named = metadata.get("ss_base_model_version", "") + metadata.get("modelspec.architecture", "")

    def has(*marks: str) -> bool:
        return any(mark in keys for mark in marks)

    single, double = has("single_blocks", "single_transformer_blocks"), has("double_blocks")
    transformer = any(key.startswith(("transformer.", "lora_transformer_")) for key in shapes)
    unet = has("unet", "down_blocks", "input_blocks", "lora_te")
    unet = unet and not (single or double or transformer or has("joint_blocks"))
    width = _key_width(shapes, "attn2")
    deep = ("input_blocks_4_1_transformer_blocks_1", "attentions_0_transformer_blocks_1")
    added = ("text_encoder_2.", "lora_te2_", "label_emb", "add_embedding")
    if unet and (has(*added, *deep) or width == 2048 or "xl" in named):
        return SDXL
    if not single and (has("joint_blocks") or "stable-diffusion-3" in named or "sd3" in named):
        return SD3
    if unet:
        return SD2 if width == 1024 else SD1
    wide = _key_width(shapes, "attn") == 3072
    if single or double or (transformer and ("flux" in named or wide)):
        return FLUX
    if transformer:
        return SD3
    titles = ", ".join(known.title for known in ARCHITECTURES)
    raise LoraFileError(
        f"The file is for none of the known base models ({titles}); is it a LoRA for one of them? "
        f"Its first tensor is {next(iter(shapes), None)}."
    )


def _key_width(shapes: Shapes, part: str) -> int | None:
    """Number of inputs of the first key projection in a file whose name contains ``part``."""
    for key, shape in shapes.items():
        down = any(mark in key for mark in ("lora_A", "lora_down", ".down."))
        if part in key and "to_k" in key and down and len(shape) > 1:
            return shape[1]
    return None
