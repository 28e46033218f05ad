"""A reduced pipeline that makes music."""

import diffusers

from . import texts
from .parts import flow
from .reduced import Reduced


def ace_step() -> Reduced:
    from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder

    sizes = {
        "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    transformer = diffusers.AceStepTransformer1DModel(
        **sizes, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8,
        encoder_hidden_size=32,
    )  # fmt: skip
    conditions = AceStepConditionEncoder(
        **sizes, text_hidden_dim=32, timbre_hidden_dim=8, num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    )  # fmt: skip
    conditions.silence_latent.normal_()
    pipeline = diffusers.AceStepPipeline(
        vae=None, text_encoder=texts.language_model("Qwen3Model"), tokenizer=texts.qwen_words(),
        transformer=transformer, condition_encoder=conditions, scheduler=flow(),
    )  # fmt: skip
    return Reduced(pipeline, {"audio_duration": 2.0, "guidance_scale": 3.0})


SOUNDS = {"ACE-Step 1.5": ace_step}
