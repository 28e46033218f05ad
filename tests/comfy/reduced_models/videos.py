"""Transformers that draw videos."""

from __future__ import annotations

from typing import Any

from . import texts
from .parts import model_of_class
from .pictures import KANDINSKY5

_HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 64,
    "context_in_dim": 64,
    "hidden_size": 96,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [16, 16, 16],
    "theta": 256,
    "patch_size": [1, 2, 2],
    "qkv_bias": True,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}


def hunyuan_video() -> tuple[Any, Any]:
    return model_of_class("HunyuanVideo", **_HUNYUAN), texts.hunyuan_video()


def hunyuan_video_i2v() -> tuple[Any, Any]:
    """The first frame and its mask beside the latents."""
    return model_of_class(
        "HunyuanVideoI2V", **{**_HUNYUAN, "in_channels": 33}
    ), texts.hunyuan_video()


def hunyuan_video15() -> tuple[Any, Any]:
    config = {
        **_HUNYUAN,
        "in_channels": 65,
        "out_channels": 32,
        "vec_in_dim": None,
        "patch_size": [1, 1, 1],
        "guidance_embed": False,
        "byt5": True,
        "use_cond_type_embedding": True,
        "vision_in_dim": 64,
        "meanflow_sum": True,
    }
    clip = texts.qwen25("hunyuan_video", "HunyuanVideo15Tokenizer")
    return model_of_class("HunyuanVideo15", **config), clip


def _wan(kind: str, **other: Any) -> tuple[Any, Any]:
    config = {
        "image_model": "wan2.1",
        "model_type": "t2v",
        "dim": 96,
        "in_dim": 16,
        "out_dim": 16,
        "num_heads": 2,
        "num_layers": 2,
        "ffn_dim": 128,
        "patch_size": (1, 2, 2),
        "freq_dim": 32,
        "window_size": (-1, -1),
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": 1e-6,
        "text_dim": 64,
        **other,
    }
    return model_of_class(kind, **config), texts.umt5()


def wan() -> tuple[Any, Any]:
    """Also either of the two experts of Wan 2.2 14B."""
    return _wan("WAN21_T2V")


def wan_i2v() -> tuple[Any, Any]:
    """The first frame beside the latents, and as CLIP sees it beside the text."""
    return _wan("WAN21_I2V", model_type="i2v", in_dim=36)


def wan22_5b() -> tuple[Any, Any]:
    return _wan("WAN22_T2V", in_dim=48, out_dim=48)


def ltxv() -> tuple[Any, Any]:
    model = model_of_class(
        "LTXV",
        image_model="ltxv",
        in_channels=128,
        cross_attention_dim=64,
        attention_head_dim=32,
        num_attention_heads=2,
        caption_channels=64,
        num_layers=2,
        positional_embedding_theta=10000.0,
        positional_embedding_max_pos=[20, 2048, 2048],
        causal_temporal_positioning=False,
        vae_scale_factors=(8, 32, 32),
    )
    return model, texts.t5xxl("lt", "LTXVT5Tokenizer", "ltxv_te")


def mochi() -> tuple[Any, Any]:
    """Text tokens of padding are cut off by their number."""
    model = model_of_class(
        "GenmoMochi",
        image_model="mochi_preview",
        depth=2,
        patch_size=2,
        num_heads=2,
        hidden_size_x=96,
        hidden_size_y=64,
        mlp_ratio_x=128.0,  # its class insists on a feed-forward of 12288
        mlp_ratio_y=4.0,
        learn_sigma=False,
        in_channels=12,
        qk_norm=True,
        qkv_bias=False,
        out_bias=True,
        attn_drop=0.0,
        patch_embed_bias=True,
        posenc_preserve_area=True,
        timestep_mlp_bias=True,
        attend_to_padding=False,
        timestep_scale=1000.0,
        use_t5=True,
        t5_feat_dim=64,
        t5_token_length=256,
        rope_theta=10000.0,
    )
    return model, texts.t5xxl("genmo", "MochiT5Tokenizer", "mochi_te")


def kandinsky5_video() -> tuple[Any, Any]:
    model = model_of_class("Kandinsky5", **KANDINSKY5, visual_embed_dim=132)
    return model, texts.qwen25("kandinsky5", "Kandinsky5Tokenizer")
