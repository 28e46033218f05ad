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


def stable_audio3():
    """Inpainting: a mask and the sound that is kept beside the latents."""
    embedders = pytest.importorskip("comfy.ldm.audio.embedders")
    weights: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    try:
        seconds = embedders.NumberConditioner(768, 0, 384, fourier_features_type="expo")
    except TypeError:
        pytest.skip("this ComfyUI has no StableAudio3")
    for key, weight in seconds.state_dict().items():
        random = torch.randn(weight.shape, generator=generator) * 0.1
        weights[f"conditioner.conditioners.seconds_total.{key}"] = random
    weights["conditioner.conditioners.prompt.padding_embedding"] = torch.randn(
        768, generator=generator
    )
    model = model_of_class(
        "StableAudio3", weights=weights, audio_model="dit1.0", io_channels=256, embed_dim=96,
        depth=2, num_heads=1, cond_token_dim=768, global_cond_dim=768, project_cond_tokens=True,
        num_memory_tokens=4, attn_kwargs={"qk_norm": "rms", "differential": True},
        norm_type="rms_norm", timestep_features_type="expo", local_add_cond_dim=257,
        global_cond_shared_embed=True, global_cond_type="adaLN",
    )  # fmt: skip
    return model, texts.t5_gemma()


def ace_step15():
    """Words to sing, which are none, and a sound to follow, which is silence."""
    text = pytest.importorskip("comfy.text_encoders.ace15")
    model = model_of_class(
        "ACEStep15", audio_model="ace1.5", hidden_size=64, text_hidden_dim=64, num_dit_layers=2,
        num_lyric_layers=1, num_timbre_layers=1, num_tokenizer_layers=1, num_heads=2,
        num_kv_heads=2, head_dim=32, intermediate_size=64, fsq_dim=64, encoder_hidden_size=64,
        encoder_intermediate_size=64, encoder_num_heads=2,
    )  # fmt: skip

    class Tokenizer(text.ACE15Tokenizer):
        def tokenize_with_weights(self, words, return_word_ids=False, **given):
            # Else a language model writes codes, token by token, at every text.
            given["generate_audio_codes"] = False
            return super().tokenize_with_weights(words, return_word_ids, **given)

    return model, clip_of(
        Tokenizer, text.te(torch.float32), {"_model_config": texts.LANGUAGE_MODEL}
    )


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
    "Stable Audio 3": Reduced(stable_audio3, shape=(1, 256, 8), slow=True),
    "ACE-Step 1.5": Reduced(
        ace_step15,
        shape=(1, 64, 20),
        apart=("detokenizer.", "diffusion_model.tokenizer.", "qwen3_2b."),
        left_out=(
            "tokenizer and detokenizer: their input is the same for all rows; qwen3_2b: it only "
            "writes codes"
        ),
        slow=True,
    ),
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
