"""NVIDIA's Cosmos: the first one of videos, and Predict2 of pictures."""

from __future__ import annotations

from typing import Any

from . import texts
from .parts import model_of_class

_COSMOS = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 96,
    "num_blocks": 2,
    "num_heads": 2,
    "crossattn_emb_channels": 64,
    "concat_padding_mask": True,
    "pos_emb_cls": "rope3d",
    "pos_emb_interpolation": "crop",
    "use_adaln_lora": True,
    "adaln_lora_dim": 32,
}


def cosmos() -> tuple[Any, Any]:
    config = {
        **_COSMOS,
        "image_model": "cosmos",
        "block_config": "FA-CA-MLP",
        "pos_emb_learnable": False,
        "block_x_format": "THWBD",
        "affline_emb_norm": True,
        "extra_per_block_abs_pos_emb": True,
        "extra_per_block_abs_pos_emb_type": "learnable",
        "rope_h_extrapolation_ratio": 1.0,
        "rope_w_extrapolation_ratio": 1.0,
        "rope_t_extrapolation_ratio": 2.0,
    }
    return model_of_class("CosmosT2V", **config), _t5()


def cosmos_predict2() -> tuple[Any, Any]:
    config = {
        **_COSMOS,
        "image_model": "cosmos_predict2",
        "pos_emb_learnable": True,
        "min_fps": 1,
        "max_fps": 30,
    }
    return model_of_class("CosmosT2IPredict2", **config), _t5()


def _t5() -> Any:
    return texts.t5xxl("cosmos", "CosmosT5Tokenizer", "te")
