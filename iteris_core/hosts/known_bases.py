"""The sites of the well-known base models, made without their weights (on torch's meta device)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..bases import KINDS, Base
from ..errors import LoraFileError

_SDXL: Mapping[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD2: Mapping[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_SD3: Mapping[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}


@functools.cache
def known_base(kind: str) -> Base:
    """SD 1.5, SD 2.1, SDXL, SD 3 medium or FLUX.1 dev; needs diffusers and transformers."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        models: dict[str, nn.Module] = {"text_encoder": _clip(768, 12, kind == "sd3")}
        if kind == "sd1":
            models["unet"] = UNet2DConditionModel(cross_attention_dim=768)
        elif kind == "sd2":
            models = {"text_encoder": _clip(1024, 23, False), "unet": UNet2DConditionModel(**_SD2)}
        elif kind == "sdxl":
            models |= {
                "text_encoder_2": _clip(1280, 32, True),
                "unet": UNet2DConditionModel(**_SDXL),
            }
        elif kind == "sd3":
            models |= {"text_encoder_2": _clip(1280, 32, True), "text_encoder_3": _t5()}
            models["transformer"] = SD3Transformer2DModel(**_SD3)
        else:
            models |= {"text_encoder_2": _t5(), "transformer": FluxTransformer2DModel(
                guidance_embeds=True)}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    for component, model in models.items():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if component.startswith("text") and name.startswith("encoder.layers."):
                    name = f"text_model.{name}"
                shapes[f"{component}.{name}"] = tuple(module.weight.shape)
    return Base(KINDS[kind], shapes)


def guess_base(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> str:
    """Which base a file is for: ``shapes`` are of its tensors. Raises :class:`LoraFileError`."""
    text = " ".join(shapes)
    said = metadata.get("ss_base_model_version", "") + metadata.get("modelspec.architecture", "")
    if any(mark in text for mark in ("single_blocks", "single_transformer_blocks")):
        return "flux"
    if "joint_blocks" in text or "stable-diffusion-3" in said or "sd3" in said:
        return "sd3"
    if "double_blocks" in text:
        return "flux"
    if "lora_transformer_" in text or "transformer." in text:
        return "flux" if "flux" in said or _width(shapes, "attn") == 3072 else "sd3"
    marks = ("text_encoder_2.", "lora_te2_", "label_emb", "add_embedding")
    width = _width(shapes, "attn2")
    if any(mark in text for mark in marks) or "xl" in said or width == 2048:
        return "sdxl"
    if any(f"{mark}_transformer_blocks_1" in text for mark in ("input_blocks_4_1", "attentions_0")):
        return "sdxl"
    if any(mark in text for mark in ("unet", "down_blocks", "input_blocks", "lora_te")):
        return "sd2" if width == 1024 else "sd1"
    raise LoraFileError(
        "The file is for no base model that is known here (SD 1.x, 2.x, XL, 3, FLUX); is it a LoRA "
        f"of such a model? Its first tensor is {next(iter(shapes), None)}."
    )


def _width(shapes: Mapping[str, tuple[int, ...]], part: str) -> int | None:
    """Number of inputs of the first key projection whose name has ``part``."""
    for key, shape in shapes.items():
        down = any(mark in key for mark in ("lora_A", "lora_down", ".down."))
        if part in key and "to_k" in key and down and len(shape) > 1:
            return shape[1]
    return None


def _clip(width: int, layers: int, projected: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection if projected else CLIPTextModel
    return model(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=width // 64,
            num_hidden_layers=layers,
            projection_dim=width,
        )
    )


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config)
