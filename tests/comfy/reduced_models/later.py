"""Pictures by classes that came after ComfyUI 0.8.0."""

from contextlib import contextmanager
from importlib import import_module
from unittest import mock

import torch

from . import references as given
from . import texts
from .parts import clip_of, model_of_class
from .reduced import Reduced


def ernie_image():
    model = model_of_class(
        "ErnieImage", image_model="ernie", hidden_size=96, num_attention_heads=2, num_layers=2,
        ffn_hidden_size=128, text_in_dim=64, rope_axes_dim=(16, 16, 16),
    )  # fmt: skip
    text = import_module("comfy.text_encoders.ernie")
    tokenizer = texts.qwen("ministral3_3b", start=1, pad=11, left=True)
    options = {"ministral3_3b_model_config": texts.LLAMA}
    with mock.patch.object(text, "Mistral3Tokenizer", tokenizer):
        return model, clip_of(text.ErnieTokenizer, text.te(torch.float32), options)


@contextmanager
def _narrow_eyes(size):
    """Qwen 3's."""
    narrow = {"hidden_size": 64, "intermediate_size": 64, "depth": 2}
    narrow = {size: {**narrow, "deepstack_visual_indexes": [0]}}
    eyes = import_module("comfy.text_encoders.qwen3vl")
    with mock.patch.dict(eyes.QWEN3VL_VISION, narrow):
        yield


def _qwen3_vl(module, tokenizer, size, layers=4):
    text = import_module(f"comfy.text_encoders.{module}")
    config = {**texts.LANGUAGE_MODEL, "num_hidden_layers": layers}
    with _narrow_eyes(size):
        encoder = text.te(dtype_llama=torch.float32)
        return clip_of(getattr(text, tokenizer), encoder, {f"{size}_model_config": config})


def krea2():
    """Twelve layers of its text encoder at once, for layers of its own to join."""
    model = model_of_class(
        "Krea2", image_model="krea2", features=96, tdim=32, txtdim=64, heads=2, kvheads=1, layers=2,
        txtheads=2, txtkvheads=2,
    )  # fmt: skip
    text = import_module("comfy.text_encoders.krea2")
    with mock.patch.object(text, "KREA2_TAP_LAYERS", list(range(1, 13))):
        return model, _qwen3_vl("krea2", "Krea2Tokenizer", "qwen3vl_4b", 13)


def ideogram4():
    """Thirteen layers of its text encoder side by side; no text at all without guidance."""
    extra = {
        "num_attention_heads": 2, "attention_head_dim": 32, "intermediate_size": 128,
        "adaln_dim": 32, "llm_features_dim": 13 * 64, "mrope_section": [6, 5, 5],
    }  # fmt: skip
    model = model_of_class(
        "Ideogram4", extra, image_model="ideogram4", in_channels=128, num_layers=2
    )
    text = import_module("comfy.text_encoders.ideogram4")
    with mock.patch.object(text, "IDEOGRAM4_TAP_LAYERS", list(range(1, 14))):
        return model, _qwen3_vl("ideogram4", "Ideogram4Tokenizer", "qwen3vl_8b", 14)


def boogu():
    """OmniGen's blocks behind others with two streams."""
    model = model_of_class(
        "Boogu", image_model="boogu", in_channels=16, hidden_size=96, num_layers=2,
        num_double_stream_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=32, axes_dim_rope=(16, 16, 16), axes_lens=(300, 512, 512),
        instruction_feat_dim=64,
    )  # fmt: skip
    return model, _qwen3_vl("boogu", "BooguTokenizer", "qwen3vl_8b")


def mage_flow():
    model = model_of_class(
        "MageFlow", image_model="mage_flow", num_layers=2, attention_head_dim=48,
        num_attention_heads=2, joint_attention_dim=64, axes_dims_rope=(16, 16, 16),
    )  # fmt: skip
    return model, _qwen3_vl("mage_flow", "MageFlowTokenizer", "qwen3vl_4b")


def joy_image():
    extra = {"rope_dim_list": [16, 16, 16]}
    model = model_of_class(
        "JoyImage", extra, image_model="joyimage", hidden_size=96, num_attention_heads=2,
        text_dim=64, num_layers=2,
    )  # fmt: skip
    return model, _qwen3_vl("joyimage", "JoyImageTokenizer", "qwen3vl_8b")


def hidream_o1():
    """Pixels, and a text that the denoiser reads as tokens; it keeps keys and values of them."""
    language_model = {**texts.LANGUAGE_MODEL, "num_hidden_layers": 2, "num_key_value_heads": 1}
    eyes = {"hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "depth": 1}
    model = model_of_class(
        "HiDreamO1",
        image_model="hidream_o1",
        text_config_overrides={**language_model, "head_dim": 32, "rope_dims": [6, 5, 5]},
        vision_config_overrides=eyes,
    )
    text = import_module("comfy.text_encoders.hidream_o1")
    return model, clip_of(text.HiDreamO1Tokenizer, text.HiDreamO1TE, {})


def _pixel_dit(kind, **other):
    """Of pixels: patches see each other and the text, then pixels see their patch."""
    model = model_of_class(
        kind, num_groups=2, hidden_size=64, pixel_hidden_size=8, pixel_attn_hidden_size=64,
        pixel_num_groups=2, patch_depth=2, pixel_depth=1, txt_embed_dim=64, **other,
    )  # fmt: skip
    return model, texts.gemma("pixeldit", "PixelDiTGemma2Tokenizer", "PixelDiTGemma2TE")


def pixel_dit():
    return _pixel_dit("PixelDiTT2I", image_model="pixeldit_t2i")


def pid():
    """A small picture that it makes larger."""
    return _pixel_dit(
        "PiD", image_model="pid", lq_hidden_dim=32, lq_num_res_blocks=1, lq_latent_channels=16,
        latent_spatial_down_factor=8,
    )  # fmt: skip


def lens():
    """Four layers of its text encoder, which has experts."""
    model = model_of_class(
        "Lens", image_model="lens", num_layers=2, attention_head_dim=48, num_attention_heads=2,
        enc_hidden_dim=64, axes_dims_rope=(16, 16, 16),
    )  # fmt: skip
    return model, texts.gpt_oss()


def minimax_h3():
    """A video and its sound at once, one sample at a time."""
    model = model_of_class(
        "MiniMaxH3", image_model="minimax_h3", hidden_size=96, num_layers=2,
        token_refiner_num_layers=1, num_attention_heads=2, attention_head_dim=48,
        ffn_hidden_size=128, text_dim=64, timestep_input_dim=32, time_embed_hidden_size=64,
        time_embed_dim=32, rope_inv_freq_len=8,
    )  # fmt: skip
    return model, _qwen3_vl("mage_flow", "MageFlowTokenizer", "qwen3vl_4b")


_PIXELS = {
    "apart": ("pixel_blocks.0.mlp.",),
    "left_out": "pixel_blocks.*.mlp: it gets half of all patches, and then the others",
}
LATER = {
    "ERNIE-Image": Reduced(ernie_image),
    "Krea 2": Reduced(krea2),
    "Ideogram 4": Reduced(ideogram4),
    "HiDream O1": Reduced(hidream_o1, side=64, left_out="visual: only reference pictures reach it"),
    "Boogu-Image": Reduced(boogu, entries=given.edited(16, 6, 6)),
    "Mage-Flow": Reduced(mage_flow, entries=given.edited(128, 6, 6)),
    "PixelDiT": Reduced(pixel_dit, side=64, **_PIXELS),
    "PiD": Reduced(
        pid,
        side=64,
        entries={"lq_latent": given.picture(16, 2, 2), "degrade_sigma": torch.tensor([0.1])},
        **_PIXELS,
        slow=True,
    ),
    "Lens": Reduced(
        lens, apart=("text_encoder",), left_out="text encoder: it runs one text at a time"
    ),
    "JoyImage": Reduced(joy_image, entries=given.edited(16, 1, 6, 6)),
}
