"""Reduced pipelines that draw videos."""

from __future__ import annotations

from typing import Any

import diffusers

from . import texts
from .parts import TEXT, flow, picture
from .reduced import Reduced

SIDE = {"height": 32, "width": 32, "num_frames": 5}


def _wan_transformer(**options: Any):
    return diffusers.WanTransformer3DModel(
        **{
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
            "out_channels": 4, "text_dim": 32, "freq_dim": 16, "ffn_dim": 40, "num_layers": 2,
            "rope_max_seq_len": 64, **options,
        }
    )  # fmt: skip


def _wan_autoencoder():
    return diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4,
        latents_std=[1.2] * 4,
    )  # fmt: skip


def _wan(**parts: Any):
    return diffusers.WanPipeline(
        tokenizer=texts.t5_tokens(), text_encoder=texts.t5(multilingual=True),
        vae=_wan_autoencoder(), scheduler=flow(shift=3.0),
        transformer=_wan_transformer(), **parts,
    )  # fmt: skip


def wan() -> Reduced:
    return Reduced(_wan(), {**SIDE, **TEXT})


def wan_two_experts() -> Reduced:
    pipeline = _wan(transformer_2=_wan_transformer(), boundary_ratio=0.875)
    return Reduced(pipeline, {**SIDE, **TEXT, "guidance_scale_2": 3.0})


def wan_picture() -> Reduced:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    eye = CLIPVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    pipeline = diffusers.WanImageToVideoPipeline(
        tokenizer=texts.t5_tokens(), text_encoder=texts.t5(multilingual=True),
        vae=_wan_autoencoder(), scheduler=flow(shift=3.0), image_encoder=CLIPVisionModel(eye),
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        transformer=_wan_transformer(in_channels=4 + 4 + 4, image_dim=32, added_kv_proj_dim=32),
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, **TEXT, "image": picture(32)})


def ltx() -> Reduced:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=2, caption_channels=32,
    )  # fmt: skip
    pipeline = diffusers.LTXPipeline(
        scheduler=flow(), vae=None, text_encoder=texts.t5(), tokenizer=texts.t5_tokens(),
        transformer=transformer,
    )  # fmt: skip
    return Reduced(pipeline, {"height": 64, "width": 64, "num_frames": 9, **TEXT})


def hunyuan() -> Reduced:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=2, num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=32,
        rope_axes_dim=(4, 4, 8), patch_size=1,
    )  # fmt: skip
    pipeline = diffusers.HunyuanVideoPipeline(
        text_encoder=texts.language_model("LlamaModel"), tokenizer=texts.words(),
        text_encoder_2=texts.clip(), tokenizer_2=texts.clip_words(), vae=None,
        transformer=transformer, scheduler=flow(shift=7.0),
    )  # fmt: skip
    template = {"template": "Describe {}", "crop_start": 2}
    return Reduced(pipeline, {**SIDE, **TEXT, "prompt_template": template})


def cogvideox() -> Reduced:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=32, num_layers=2, sample_width=4, sample_height=4,
        sample_frames=5, max_text_seq_length=96,
    )  # fmt: skip
    pipeline = diffusers.CogVideoXPipeline(
        tokenizer=texts.t5_tokens(), text_encoder=texts.t5(), vae=None, transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, **TEXT})


def mochi() -> Reduced:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=32, time_embed_dim=8,
    )  # fmt: skip
    pipeline = diffusers.MochiPipeline(
        scheduler=flow(), vae=None, text_encoder=texts.t5(), tokenizer=texts.t5_tokens(),
        transformer=transformer,
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, "num_frames": 7, **TEXT})


VIDEOS = {
    "Wan": wan,
    "Wan 2.2 with two experts": wan_two_experts,
    "Wan from a picture": wan_picture,
    "LTX-Video": ltx,
    "HunyuanVideo": hunyuan,
    "CogVideoX": cogvideox,
    "Mochi": mochi,
}
