"""Narrow text encoders in ComfyUI's own classes.

Tokenizers that come with a checkpoint have another's vocabulary: SentencePiece ones that of
Pile-T5, which is in ComfyUI, and those of Llama and Mistral Qwen's, with their own special tokens.
"""

import functools
import re
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch

from .parts import clip_of

FULL_CLIP = {"num_hidden_layers": 3, "intermediate_size": 64}
CLIP = {**FULL_CLIP, "hidden_size": 64, "num_attention_heads": 2}
T5 = {"num_layers": 2, "d_model": 64, "d_ff": 64, "num_heads": 2, "d_kv": 32}
LANGUAGE_MODEL = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA = {**LANGUAGE_MODEL, "vocab_size": 152064}
_BERT = {
    "hidden_size": 1024, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64,
}  # fmt: skip
_BYT5 = {"num_layers": 1, "d_model": 1472, "d_ff": 64, "num_heads": 2, "d_kv": 32}


def clip(module, tokenizer, encoder, **options):
    """A CLIP of two classes of a module of ComfyUI."""
    found = import_module(module)
    return clip_of(getattr(found, tokenizer), getattr(found, encoder), options)


def flux(clip_l=CLIP):
    import comfy.text_encoders.flux as text

    options = {"clip_l_model_config": clip_l, "t5xxl_model_config": T5}
    return clip_of(text.FluxTokenizer, text.flux_clip(torch.float32), options)


def sd3(*, t5):
    """Its states are filled up to 4096, so T5 has that width."""
    import comfy.text_encoders.sd3_clip as text

    options = {
        "clip_l_model_config": CLIP,
        "clip_g_model_config": CLIP,
        "t5xxl_model_config": {**T5, "d_model": 4096},
    }
    encoder = text.sd3_clip(t5=t5, dtype_t5=torch.float32)
    return clip_of(text.SD3Tokenizer, encoder, options)


def t5xxl(module, tokenizer, encoder):
    """T5-XXL alone; ``encoder`` is ComfyUI's function that makes its class."""
    found = import_module(f"comfy.text_encoders.{module}")
    make = getattr(found, encoder)
    return clip_of(getattr(found, tokenizer), make(torch.float32), {"t5xxl_model_config": T5})


def aura():
    import comfy.text_encoders.aura_t5 as text

    return clip_of(text.AuraT5Tokenizer, text.AuraT5Model, {"pile_t5xl_model_config": T5})


def umt5():
    import comfy.text_encoders.wan as text

    options = {"umt5xxl_model_config": {**T5, "vocab_size": 32128}}
    data = {"spiece_model": pile()}
    return clip_of(text.WanT5Tokenizer, text.te(torch.float32), options, data)


def hydit():
    """BERT and a multilingual T5, both with masks."""
    import comfy.text_encoders.hydit as text

    options = {"hydit_clip_model_config": _BERT, "mt5xl_model_config": {**T5, "vocab_size": 32128}}
    data = {"mt5xl.spiece_model": pile()}
    return clip_of(text.HyditTokenizer, text.HyditModel, options, data)


def gemma(module="lumina2", tokenizer="LuminaTokenizer", encoder=None):
    """Gemma 2; ``encoder`` is the name of its class."""
    text = pytest.importorskip(f"comfy.text_encoders.{module}")
    options = {"gemma2_2b_model_config": {**LANGUAGE_MODEL, "vocab_size": 32128}}
    made = getattr(text, encoder) if encoder else text.te(torch.float32)
    return clip_of(getattr(text, tokenizer), made, options, {"spiece_model": pile()})


def t5_gemma():
    """T5Gemma, whose widths are fixed."""
    text = pytest.importorskip("comfy.text_encoders.sa3")

    class Config(text.T5GemmaEncoderConfig):
        def __init__(self):
            super().__init__()
            self.vocab_size, self.intermediate_size, self.num_hidden_layers = 32128, 64, 2
            self.num_attention_heads = self.num_key_value_heads = 2

    with mock.patch.object(text, "T5GemmaEncoderConfig", Config):
        data = {"spiece_model": pile()}
        return clip_of(text.SAT5GemmaTokenizer, text.SAT5GemmaModel, {}, data)


def gpt_oss():
    """GPT-OSS, experts included; its tokenizer comes with the checkpoint, so it is Qwen's here."""
    text = pytest.importorskip("comfy.text_encoders.gpt_oss")
    narrow = {
        "vocab_size": 200000, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    ops = import_module("comfy.ops")

    class Experts(ops.mixed_precision_ops({}, torch.float32).MoEExperts):
        def __init__(self, num_experts, in_features, out_features, **how):
            super().__init__(num_experts, in_features, out_features, **how)
            weight = torch.empty(num_experts, out_features, in_features)
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

    plain = type("Plain", (ops.manual_cast,), {"MoEExperts": Experts})
    options = {
        "gpt_oss_config": narrow, "selected_layers": (0, 1, 2, 3), "custom_operations": plain,
    }  # fmt: skip
    data = {"tokenizer_json": _qwen_json()}
    return clip_of(text.LensTokenizer, text.lens_te(torch.float32), options, data)


def qwen3(module, tokenizer, key):
    """Qwen 3 without eyes; ``key`` is what ComfyUI calls it there."""
    text = import_module(f"comfy.text_encoders.{module}")
    options = {f"{key}_model_config": LANGUAGE_MODEL}
    return clip_of(getattr(text, tokenizer), text.te(torch.float32), options)


def qwen25(module, tokenizer, size="7b"):
    """Qwen 2.5 with its eyes, and what stands beside it: CLIP-L, or ByT5 for text in quotes."""
    text = pytest.importorskip(f"comfy.text_encoders.{module}")
    # HunyuanVideo 1.5 has a tokenizer of its own, but HunyuanImage's encoder.
    encoder = getattr(text, "te", None) or import_module("comfy.text_encoders.hunyuan_image").te
    options = {
        f"qwen25_{size}_model_config": LANGUAGE_MODEL,
        "clip_l_model_config": CLIP,
        "_model_config": _BYT5,  # what ComfyUI looks up for an encoder that it gives no name
    }
    with _narrow_eyes():
        return clip_of(getattr(text, tokenizer), encoder(dtype_llama=torch.float32), options)


def mistral():
    """FLUX.2's: three layers' states side by side, padded on the left."""
    import comfy.text_encoders.flux as text

    class Model(text.Mistral3_24BModel):
        def __init__(self, **options):
            super().__init__(**{**options, "layer": [1, 2, 3]})

    encoder = functools.partial(text.Flux2TEModel, clip_model=Model)
    tokenizer = qwen("mistral3_24b", start=1, pad=11, left=True)
    with mock.patch.object(text, "Mistral3Tokenizer", tokenizer):
        return clip_of(text.Flux2Tokenizer, encoder, {"mistral3_24b_model_config": LLAMA})


def klein():
    import comfy.text_encoders.flux as text

    if not hasattr(text, "klein_te"):
        pytest.skip("this ComfyUI has no FLUX.2 Klein")

    class Model(text.Qwen3_4BModel):
        def __init__(self, **options):
            super().__init__(**{**options, "layer": [1, 2, 3]})

    with mock.patch.object(text, "Qwen3_4BModel", Model):
        encoder = text.klein_te(torch.float32)
    return clip_of(text.KleinTokenizer, encoder, {"qwen3_4b_model_config": LANGUAGE_MODEL})


def hunyuan_video():
    import comfy.text_encoders.hunyuan_video as text

    options = {
        "clip_l_model_config": CLIP,
        "llama_model_config": LANGUAGE_MODEL,
        "vocab_size": LLAMA["vocab_size"],
    }
    encoder = text.hunyuan_video_clip(torch.float32)
    with _llama():
        return clip_of(text.HunyuanVideoTokenizer, encoder, options)


def hidream():
    """Two CLIPs, T5, and every layer of Llama."""
    import comfy.text_encoders.hidream as text

    options = {
        "clip_l_model_config": CLIP, "clip_g_model_config": CLIP, "t5xxl_model_config": T5,
        "llama_model_config": LANGUAGE_MODEL, "vocab_size": LLAMA["vocab_size"],
    }  # fmt: skip
    encoder = text.hidream_clip(dtype_t5=torch.float32, dtype_llama=torch.float32)
    with _llama():
        return clip_of(text.HiDreamTokenizer, encoder, options)


def pile():
    """Pile-T5's SentencePiece model."""
    import comfy.text_encoders

    folder = Path(next(iter(comfy.text_encoders.__path__)))
    data = (folder / "t5_pile_tokenizer" / "tokenizer.model").read_bytes()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _qwen_json():
    import comfy.text_encoders

    folder = Path(next(iter(comfy.text_encoders.__path__))) / "qwen25_tokenizer"
    from transformers import Qwen2TokenizerFast

    text = Qwen2TokenizerFast.from_pretrained(folder).backend_tokenizer.to_str()
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


_HEADERS = {
    "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eot_id|>": 128009, "user": 882,
}  # fmt: skip
"""Tokens of Llama's by which ComfyUI cuts the template off."""


def qwen(key, start, pad, left=False):
    """Qwen's tokenizer with other special tokens."""
    import comfy.text_encoders.z_image as text

    def tokens(plain, words):
        parts = re.split(f"({'|'.join(map(re.escape, _HEADERS))})", words)
        found = [[_HEADERS[p]] if p in _HEADERS else plain(p)["input_ids"] for p in parts if p]
        return {"input_ids": [token for some in found for token in some]}

    class Tokenizer(text.Qwen3Tokenizer):
        def __init__(
            self, embedding_directory=None, tokenizer_data=None, min_length=1, pad_token=pad
        ):
            super().__init__(embedding_directory, tokenizer_data or {})
            self.embedding_key, self.min_length = key, min_length
            self.start_token = start
            self.tokenizer = functools.partial(tokens, self.tokenizer)
            self.pad_token, self.pad_left = pad_token, left

    return Tokenizer


@contextmanager
def _llama():
    import comfy.text_encoders.hunyuan_video as text

    tokenizer = qwen("llama", start=128000, pad=128258)
    with mock.patch.object(text, "LLAMA3Tokenizer", tokenizer):
        yield


@contextmanager
def _narrow_eyes():
    import comfy.text_encoders.qwen_vl as eyes

    kind = eyes.Qwen2VLVisionTransformer

    def narrow(hidden_size, output_hidden_size, **how):
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "num_layers": 2}
        return kind(output_hidden_size=output_hidden_size, **sizes, **how)

    with mock.patch.object(eyes, "Qwen2VLVisionTransformer", narrow):
        yield
