"""SD 1.5, SDXL, SD 3 and FLUX.1 of ComfyUI's own classes at full width, without weights, and their
layers under diffusers' names."""

from importlib import import_module
from typing import Any

import torch
from reduced_models.parts import made, taken_apart
from torch import Tensor

_UNET = {
    "use_checkpoint": False, "image_size": 32, "out_channels": 4, "use_spatial_transformer": True,
    "legacy": False, "in_channels": 4, "model_channels": 320, "dtype": torch.float32,
    "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {
        **_UNET, "adm_in_channels": None, "num_res_blocks": [2] * 4, "num_heads": 8,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "channel_mult": [1, 2, 4, 4],
        "transformer_depth_middle": 1, "use_linear_in_transformer": False, "context_dim": 768,
        "transformer_depth_output": [1] * 9 + [0] * 3,
    },
    "sdxl": {
        **_UNET, "num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [2] * 3,
        "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 2, 4],
        "transformer_depth_middle": 10, "use_linear_in_transformer": True, "context_dim": 2048,
        "num_head_channels": 64, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    },
    "sd3": {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 24, "input_size": None,
        "adm_in_channels": 2048, "pos_embed_scaling_factor": None, "pos_embed_max_size": 192,
        "num_patches": 192 * 192, "x_block_self_attn_layers": [],
        "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
    },
    "flux": {
        "image_model": "flux", "axes_dim": [16, 56, 56], "num_heads": 24, "mlp_ratio": 4.0,
        "theta": 10000, "out_channels": 16, "qkv_bias": True, "txt_ids_dims": [], "in_channels": 16,
        "hidden_size": 3072, "context_in_dim": 4096, "patch_size": 2, "vec_in_dim": 768,
        "depth": 19, "depth_single_blocks": 38, "guidance_embed": True,
    },
}  # fmt: skip
_ENCODERS = {
    "sd1": ("comfy.sd1_clip", "SD1ClipModel"),
    "sdxl": ("comfy.sdxl_clip", "SDXLClipModel"),
    "sd3": ("comfy.text_encoders.sd3_clip", "SD3ClipModel"),
    "flux": ("comfy.text_encoders.flux", "FluxClipModel"),
}
_TABLES = {"sd1": "unet", "sdxl": "unet", "sd3": "mmdit", "flux": "flux"}
_OF_FLUX_2 = (".to_qkv_mlp_proj.weight", ".attn.to_out.weight")
"""FLUX.2's names stand for FLUX.1's layers beside its own."""


def released(kind: str) -> tuple[Any, Any]:
    """The denoiser and the text encoders."""
    import comfy.model_detection

    config = comfy.model_detection.model_config_from_unet_config(dict(CONFIGS[kind]), {})
    config.set_inference_dtype(torch.float32, None)
    module, name = _ENCODERS[kind]
    with torch.device("meta"):
        clip = getattr(import_module(module), name)(device="meta", dtype=torch.float32)
        return made(config, {}), clip


def diffusers_names(kind: str, changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Changes of ComfyUI's weights by diffusers' sites, after ComfyUI's own conversion tables."""
    import comfy.utils

    component = "unet" if _TABLES[kind] == "unet" else "transformer"
    table = getattr(comfy.utils, f"{_TABLES[kind]}_to_diffusers")(CONFIGS[kind])
    found: dict[str, Tensor] = {}
    for name, target in table.items():
        if not name.endswith(".weight") or name.endswith(_OF_FLUX_2):
            continue
        key, offset, function = taken_apart(target)
        if (change := changes.get(f"diffusion_model.{key}")) is not None:
            change = change if offset is None else change.narrow(*offset)
            site = f"{component}.{name.removesuffix('.weight')}"
            found[site] = change if function is None else function(change)
    encoders = {"clip_l": "text_encoder", "clip_g": "text_encoder_2",
                "t5xxl": "text_encoder_3" if kind == "sd3" else "text_encoder_2"}  # fmt: skip
    for key, change in changes.items():
        encoder, _, path = key.partition(".transformer.")
        if encoder in encoders:
            found[f"{encoders[encoder]}.{path.removesuffix('.weight')}"] = change
    return found
