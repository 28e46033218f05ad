"""Transformers that make sounds, and LTX-2, which can."""

import functools
from unittest import mock

import pytest
import torch

from . import texts
from .parts import clip_of, model_of_class
from .reduced import Reduced


def ace_step():
    """Words to sing beside the text, which are none."""
    import comfy.ldm.ace.model as ldm
    import comfy.text_encoders.ace as text

    narrow = {"output_size": 64, "attention_heads": 2, "linear_units": 64, "num_blocks": 1}
    lyrics = functools.partial(ldm.LyricEncoder, **narrow)
    with mock.patch.object(ldm, "LyricEncoder", lyrics):
        model = model_of_class(
            "ACEStep", audio_model="ace", attention_head_dim=32, num_attention_heads=2,
            inner_dim=64, in_channels=8, out_channels=8, num_layers=2, mlp_ratio=2.0, max_height=16,
            max_width=4096, max_position=4096, patch_size=[16, 1], text_embedding_dim=64,
            lyric_hidden_size=64, lyric_encoder_vocab_size=6693,
        )  # fmt: skip
    options = {"_model_config": {**texts.T5, "vocab_size": 32128}}
    data = {"spiece_model": texts.pile()}
    return model, clip_of(text.AceT5Tokenizer, text.AceT5Model, options, data)


def stable_audio():
    """Its length in seconds beside the text."""
    import comfy.ldm.audio.embedders as embedders

    weights: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name in ("seconds_start", "seconds_total"):
        seconds = embedders.NumberConditioner(768, min_val=0, max_val=512).state_dict()
        for key, weight in seconds.items():
            random = torch.randn(weight.shape, generator=generator) * 0.1
            weights[f"conditioner.conditioners.{name}.{key}"] = random
    model = model_of_class(
        "StableAudio", weights=weights, audio_model="dit1.0", io_channels=64, embed_dim=96, depth=2,
        num_heads=2, cond_token_dim=768, global_cond_dim=2 * 768, project_cond_tokens=True,
    )  # fmt: skip
    options = {"t5base_model_config": {**texts.T5, "d_model": 768}}
    clip = texts.clip("comfy.text_encoders.sa_t5", "SAT5Tokenizer", "SAT5Model", **options)
    return model, clip


def ltx2():
    """Of a latent that has no sound."""
    import comfy.text_encoders.llama as llama
    import comfy.text_encoders.lt as text

    if not hasattr(llama, "GEMMA3_VISION_CONFIG"):
        pytest.skip("this ComfyUI has a text encoder of LTX-2 that cannot be narrow")
    model = model_of_class(
        "LTXAV", image_model="ltxav", cross_attention_dim=64, audio_cross_attention_dim=32,
        attention_head_dim=32, audio_attention_head_dim=16, num_attention_heads=2,
        audio_num_attention_heads=2, caption_channels=64, num_layers=2,
        connector_attention_head_dim=32, connector_num_attention_heads=2, connector_num_layers=1,
    )  # fmt: skip
    eyes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    options = {"_model_config": {**texts.LANGUAGE_MODEL, "vocab_size": 32128}}
    with mock.patch.dict(llama.GEMMA3_VISION_CONFIG, {**eyes, "num_hidden_layers": 1}):
        encoder = text.ltxav_te(torch.float32, video_projection_dim=64)
        data = {"spiece_model": texts.pile()}
        return model, clip_of(text.LTXAVGemmaTokenizer, encoder, options, data)


SOUNDS = {
    "ACE-Step": Reduced(
        ace_step,
        shape=(1, 8, 16, 8),
        apart=("speaker_embedder", "projectors.", ".linear_pos", ".add_", ".to_add_out"),
        left_out=(
            "projectors, add_* and to_add_out: no forward reaches them; speaker_embedder: it gets "
            "zeros; linear_pos: its input is the same for all rows"
        ),
    ),
    "Stable Audio": Reduced(stable_audio, shape=(1, 64, 8)),
    "LTX-2": Reduced(
        ltx2,
        video=True,
        apart=(
            "audio_",
            "av_ca_",
            "_to_audio",
            "_embeddings_connector",
            "text_embedding_projection",
        ),
        left_out=(
            "audio_*, *_to_audio_attn and av_ca_*: only a latent with sound reaches them; "
            "*_embeddings_connector and text_embedding_projection: they run before the denoiser"
        ),
        slow=True,
    ),
}
