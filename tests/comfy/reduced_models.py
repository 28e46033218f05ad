"""SDXL, FLUX, Z-Image and Qwen-Image in ComfyUI's own classes, narrow, with random weights; LoRAs.

ComfyUI tells architectures by their full widths, so no checkpoint of these can be detected; they
are made from its classes as its loader would make them. The text encoders keep CLIP's widths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

CLIP = {"num_hidden_layers": 3, "intermediate_size": 64}
T5 = {"num_layers": 1, "d_model": 64, "d_ff": 64, "num_heads": 2, "d_kv": 32}
LANGUAGE_MODEL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
RANK = 4


def sdxl() -> tuple[Any, Any]:
    import comfy.sdxl_clip
    import comfy.supported_models

    class Small(comfy.supported_models.SDXL):
        unet_extra_config = {"num_heads": -1, "num_head_channels": 32}  # noqa: RUF012

    config = Small(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "channel_mult": [1, 2],
            "num_res_blocks": [1, 1],
            "transformer_depth": [0, 1],
            "transformer_depth_output": [0, 0, 1, 1],
            "transformer_depth_middle": 1,
            "context_dim": 2048,
            "adm_in_channels": 2816,
            "num_classes": "sequential",
            "use_linear_in_transformer": True,
            "use_spatial_transformer": True,
            "use_temporal_attention": False,
            "use_checkpoint": False,
            "legacy": False,
        }
    )
    options = {"clip_l_model_config": CLIP, "clip_g_model_config": CLIP}
    tokenizer, encoder = comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel
    return _model(config), _clip(tokenizer, encoder, options)


def flux() -> tuple[Any, Any]:
    import comfy.supported_models
    import comfy.text_encoders.flux
    from comfy.ldm.flux.model import FluxParams

    later = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    config = comfy.supported_models.Flux(
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 768,
            "context_in_dim": 64,
            "hidden_size": 64,
            "mlp_ratio": 4.0,
            "num_heads": 2,
            "depth": 1,
            "depth_single_blocks": 1,
            "axes_dim": [8, 12, 12],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": True,
            **later,
        }
    )
    options = {"clip_l_model_config": CLIP, "t5xxl_model_config": T5}
    module = comfy.text_encoders.flux
    return _model(config), _clip(module.FluxTokenizer, module.flux_clip(torch.float32), options)


def zimage() -> tuple[Any, Any]:
    """Joint attention over a picture and a text that no tokenizer pads."""
    import comfy.supported_models
    import comfy.text_encoders.z_image as text

    config = comfy.supported_models.ZImage(
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 256,
            "cap_feat_dim": 64,
            "n_layers": 2,
            "qk_norm": True,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 4,
            "axes_dims": [16, 24, 24],
            "axes_lens": [300, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 2.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        }
    )
    options = {"qwen3_4b_model_config": LANGUAGE_MODEL}
    return _model(config), _clip(text.ZImageTokenizer, text.te(torch.float32), options)


def qwen() -> tuple[Any, Any]:
    """A text encoder that gives a mask for some texts and none for others."""
    import comfy.supported_models
    import comfy.text_encoders.qwen_image as text

    config = comfy.supported_models.QwenImage(
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 2,
            "attention_head_dim": 48,
            "num_attention_heads": 2,
            "joint_attention_dim": 64,
            "axes_dims_rope": (16, 16, 16),
        }
    )
    options = {"qwen25_7b_model_config": LANGUAGE_MODEL}
    return _model(config), _clip(text.QwenImageTokenizer, text.te(torch.float32), options)


class _NoTokenizer:
    """For a text encoder whose tokenizer comes with its checkpoint."""

    def __init__(self, **_: Any) -> None:
        pass


def wan() -> tuple[Any, Any]:
    """A denoiser without any names of its own, and an encoder (UMT5) without kohya names."""
    import comfy.supported_models
    import comfy.text_encoders.wan

    config = comfy.supported_models.WAN21_T2V(
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 64,
            "ffn_dim": 96,
            "freq_dim": 32,
            "text_dim": 64,
            "num_heads": 2,
            "num_layers": 1,
        }
    )
    options = {"umt5xxl_model_config": {**T5, "vocab_size": 100}}
    return _model(config), _clip(_NoTokenizer, comfy.text_encoders.wan.te(torch.float32), options)


def _model(config: Any) -> Any:
    import comfy.model_management as memory
    import comfy.model_patcher

    config.set_inference_dtype(torch.float32, None)
    with torch.inference_mode():
        model = config.get_model({}, "")
        _fill(model.diffusion_model)
    return comfy.model_patcher.ModelPatcher(
        model, memory.get_torch_device(), memory.unet_offload_device()
    )


def _clip(tokenizer: Any, encoder: Any, options: dict[str, Any]) -> Any:
    import comfy.sd
    import comfy.supported_models_base

    target = comfy.supported_models_base.ClipTarget(tokenizer, encoder)
    with torch.inference_mode():
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, **options})
        _fill(clip.cond_stage_model)
    return clip


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(module.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:
            weight.copy_(noise * 0.02 + float("norm" in name and not name.endswith("bias")))
        else:
            weight.copy_(noise * 0.5 / weight[0].numel() ** 0.5)


def write_lora(file: Path, sites: dict[str, tuple[int, int]], seed: int, rank: int = RANK) -> Path:
    """A LoRA with the module names of ``sites``, each (out, in)."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (out, width) in sites.items():
        tensors[f"{name}.lora_A.weight"] = (
            torch.randn(rank, width, generator=generator) / width**0.5
        )
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 4
    save_file(tensors, file)
    return file
