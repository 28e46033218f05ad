"""NVIDIA's Cosmos Predict2, and Anima, which is made of it."""

import functools
from importlib import import_module
from unittest import mock

import pytest
import torch

from . import references as given
from . import texts
from .parts import clip_of, model_of_class
from .reduced import Reduced

_PREDICT2 = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "model_channels": 96, "num_blocks": 2, "num_heads": 2,
    "crossattn_emb_channels": 64, "concat_padding_mask": True, "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
    "use_adaln_lora": True, "adaln_lora_dim": 32,
}  # fmt: skip


def _predict2(kind, **other):
    model = model_of_class(kind, **{**_PREDICT2, "image_model": "cosmos_predict2", **other})
    return model, texts.t5xxl("cosmos", "CosmosT5Tokenizer", "te")


def anima():
    """Tokens of T5 besides, for layers of the denoiser that rewrite the text."""
    ldm = pytest.importorskip("comfy.ldm.anima.model")
    adapter = functools.partial(ldm.LLMAdapter, num_layers=1)
    with mock.patch.object(ldm, "LLMAdapter", adapter):
        wide = {**_PREDICT2, "image_model": "anima", "crossattn_emb_channels": 1024}
        model = model_of_class("Anima", **wide)
    text = import_module("comfy.text_encoders.anima")
    options = {"qwen3_06b_model_config": {**texts.LANGUAGE_MODEL, "hidden_size": 1024}}
    return model, clip_of(text.AnimaTokenizer, text.te(torch.float32), options)


COSMOS = {
    "Cosmos Predict2": Reduced(lambda: _predict2("CosmosT2IPredict2")),
    "Cosmos Predict2 I2V": Reduced(
        # A mask of the frames that are there already beside the latents.
        lambda: _predict2("CosmosI2VPredict2", in_channels=17),
        video=True,
        entries=given.first_frame(16, 3),
        slow=True,
    ),
    "Anima": Reduced(anima, slow=True),
}
