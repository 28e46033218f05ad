"""Reduced pipelines that exist as modular ones only."""

from typing import Any

import diffusers

from . import texts
from .parts import SIDE, flow, qwen_autoencoder
from .reduced import PROMPTS, Reduced


def _of_blocks(name: str, **parts: Any) -> Any:
    """A pipeline of the class, without the blocks that write its prompt anew and that decode."""
    kind = getattr(diffusers, name)
    blocks = kind().blocks
    for further in ("prompt_upsampler", "decode"):
        blocks.sub_blocks.pop(further, None)
    pipeline = kind(blocks=blocks)
    pipeline.update_components(**parts)
    return pipeline


def anima() -> Reduced:
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2),
        extra_pos_embed_type=None, concat_padding_mask=True,
    )  # fmt: skip
    conditioner = diffusers.AnimaTextConditioner(
        source_dim=32, target_dim=32, model_dim=32, num_layers=2, num_attention_heads=2,
        target_vocab_size=99, min_sequence_length=64,
    )  # fmt: skip
    pipeline = _of_blocks(
        "AnimaModularPipeline", transformer=transformer, text_conditioner=conditioner,
        text_encoder=texts.language_model("Qwen3Model"), tokenizer=texts.qwen_words(),
        t5_tokenizer=texts.t5_tokens(), vae=qwen_autoencoder(), scheduler=flow(shift=3.0),
    )  # fmt: skip
    return Reduced(pipeline, SIDE)


def flux3() -> Reduced:
    transformer = diffusers.Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64, timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    pipeline = _of_blocks(
        "Flux3ModularPipeline", transformer=transformer, text_encoder=texts.qwen3_vl(True),
        tokenizer=texts.qwen3_processor(), scheduler=flow(),
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, "text_encoder_out_layers": (1, 2)})


def minimax_h3() -> Reduced:
    transformer = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=2,
        num_refiner_layers=1, ffn_dim=40, text_dim=32, freq_dim=16, time_embed_hidden_dim=24,
        time_embed_dim=16, rope_freq_dim=2,
    )  # fmt: skip
    # It looks at the fiftieth layer of its text encoder, which has three here.
    diffusers.MiniMaxH3ModularPipeline.text_encoder_layer = 2
    pipeline = _of_blocks(
        "MiniMaxH3ModularPipeline", transformer=transformer, text_encoder=texts.qwen3_vl(True),
        tokenizer=texts.qwen_words(), processor=texts.qwen3_processor(),
        scheduler=diffusers.MiniMaxH3Scheduler(), audio_scheduler=diffusers.MiniMaxH3Scheduler(),
    )  # fmt: skip
    # It knows no empty prompt.
    prompts = tuple(filter(None, PROMPTS))
    return Reduced(pipeline, {**SIDE, "num_frames": 124}, prompts=prompts)


MODULAR = {"Anima": anima, "FLUX.3": flux3, "MiniMax H3": minimax_h3}
