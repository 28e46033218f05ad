"""Architectures that came after ComfyUI 0.8.0."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any
from unittest import mock

import torch

from . import texts
from .flux import config
from .parts import clip_of, model_of_class


def longcat_image() -> tuple[Any, Any]:
    found = config(guidance_embed=False, vec_in_dim=None, txt_ids_dims=[1, 2])
    clip = texts.qwen25("longcat_image", "LongCatImageTokenizer")
    return model_of_class("LongCatImage", **found), clip


def ernie_image() -> tuple[Any, Any]:
    text = import_module("comfy.text_encoders.ernie")
    model = model_of_class(
        "ErnieImage",
        image_model="ernie",
        hidden_size=96,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=128,
        text_in_dim=64,
        rope_axes_dim=(16, 16, 16),
    )
    tokenizer = texts.qwen("ministral3_3b", start=1, pad=11, left=True)
    options = {"ministral3_3b_model_config": texts.LLAMA}
    with mock.patch.object(text, "Mistral3Tokenizer", tokenizer):
        return model, clip_of(text.ErnieTokenizer, text.te(torch.float32), options)


def krea2() -> tuple[Any, Any]:
    """Twelve layers of its text encoder at once, for layers of its own to join."""
    text, eyes = import_module("comfy.text_encoders.krea2"), "comfy.text_encoders.qwen3vl"
    model = model_of_class(
        "Krea2",
        image_model="krea2",
        features=96,
        tdim=32,
        txtdim=64,
        heads=2,
        kvheads=1,
        layers=2,
        txtheads=2,
        txtkvheads=2,
    )
    options = {"qwen3vl_4b_model_config": {**texts.LANGUAGE_MODEL, "num_hidden_layers": 13}}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "depth": 2}
    narrow = {"qwen3vl_4b": {**sizes, "deepstack_visual_indexes": [0]}}
    layers = mock.patch.object(text, "KREA2_TAP_LAYERS", list(range(1, 13)))
    with layers, mock.patch.dict(import_module(eyes).QWEN3VL_VISION, narrow):
        return model, clip_of(text.Krea2Tokenizer, text.te(dtype_llama=torch.float32), options)


def anima() -> tuple[Any, Any]:
    """Tokens of T5 besides, for layers of the denoiser that rewrite the text."""
    from .pictures import PREDICT2

    ldm = import_module("comfy.ldm.anima.model")
    adapter = functools.partial(ldm.LLMAdapter, num_layers=1)
    with mock.patch.object(ldm, "LLMAdapter", adapter):
        wide = {**PREDICT2, "image_model": "anima", "crossattn_emb_channels": 1024}
        model = model_of_class("Anima", **wide)
    text = import_module("comfy.text_encoders.anima")
    options = {"qwen3_06b_model_config": {**texts.LANGUAGE_MODEL, "hidden_size": 1024}}
    return model, clip_of(text.AnimaTokenizer, text.te(torch.float32), options)


def cogvideox() -> tuple[Any, Any]:
    model = model_of_class(
        "CogVideoX_T2V",
        image_model="cogvideox",
        num_attention_heads=1,
        time_embed_dim=64,
        text_embed_dim=64,
        num_layers=2,
        use_rotary_positional_embeddings=True,
    )
    return model, texts.t5xxl("cogvideo", "CogVideoXTokenizer", "cogvideo_te")
