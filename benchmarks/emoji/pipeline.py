"""The parts of the base, and the pipeline: FLUX in miniature, with guidance by a second forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from .tokenizer import LENGTH
from .words import SIZE, world

HEADS, HEAD = 5, 64
WIDTH = HEADS * HEAD  # 320: four times the 64 tokens of a picture and 16 of a caption
TEXT_WIDTH, POOLED = 160, 128
CHANNELS = 4  # of a latent, 16 by 16; the pipeline packs two by two of them into a token


class EmojiPipeline(FluxPipeline):
    """FLUX's pipeline with this world's size, caption length and guidance as defaults."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        negative_prompt: Any = "",
        true_cfg_scale: float = world()["sampling"]["guidance"],
        num_inference_steps: int = world()["sampling"]["steps"],
        max_sequence_length: int = LENGTH,
        height: int = SIZE,
        width: int = SIZE,
        **options: Any,
    ) -> Any:
        """As FLUX's; the prompt that guides away is empty, one for each prompt."""
        if isinstance(negative_prompt, str) and isinstance(prompt, list):
            negative_prompt = [negative_prompt] * len(prompt)
        return super().__call__(
            prompt,
            prompt_2,
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
            num_inference_steps=num_inference_steps,
            max_sequence_length=max_sequence_length,
            height=height,
            width=width,
            **options,
        )


def new_autoencoder(width: int = 48) -> AutoencoderTiny:
    """TAESD's blocks with two halvings: 64 pixels to 16 by 16 by 4, mean 0 and deviation 1."""
    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * 3,
        decoder_block_out_channels=(width,) * 3,
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=CHANNELS,
        scaling_factor=1.0,
    )


def new_transformer(double: int = 2, single: int = 4, heads: int = HEADS) -> FluxTransformer2DModel:
    """The denoiser."""
    return FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(16, 24, 24),
    )


def new_text_encoders(clip_tokenizer: Any, words: Any) -> tuple[CLIPTextModel, T5EncoderModel]:
    """A CLIP text model for the pooled caption and a T5 encoder for its tokens."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=POOLED,
            intermediate_size=2 * POOLED,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=POOLED,
            max_position_embeddings=clip_tokenizer.model_max_length,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    return clip, new_t5(words)


def new_t5(words: Any) -> T5EncoderModel:
    """A T5 encoder for the caption's tokens."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(words),
            d_model=TEXT_WIDTH,
            d_kv=TEXT_WIDTH // 4,
            d_ff=2 * TEXT_WIDTH,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
        )
    )


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX's scheduler without a shift: so small a picture needs none."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def assemble(
    vae: AutoencoderTiny,
    transformer: FluxTransformer2DModel,
    encoders: tuple[CLIPTextModel, T5EncoderModel],
    tokenizers: tuple[Any, Any],
) -> EmojiPipeline:
    """The parts as a silent pipeline."""
    pipeline = EmojiPipeline(
        scheduler=new_scheduler(),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(folder: Path, dtype: torch.dtype | None = None) -> EmojiPipeline:
    """The pipeline in `folder`, in `dtype` (float32 by default; the files are float16)."""
    pipeline = EmojiPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.to(dtype=dtype or torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
