"""The same world drawn by an SD 3 in miniature: joint blocks alone, each with gates of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5EncoderModel

from .pipeline import CHANNELS, HEAD, TEXT_WIDTH, new_scheduler, new_t5
from .tokenizer import LENGTH
from .words import SIZE, world

BLOCKS, HEADS, PATCH = 4, 4, 2
PROJECTED = 64  # of each CLIP; both together are the pooled caption


class Emoji3Pipeline(StableDiffusion3Pipeline):
    """SD 3's pipeline with this world's size, caption length and guidance as defaults."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        guidance_scale: float = world()["sampling"]["guidance"],
        num_inference_steps: int = world()["sampling"]["steps"],
        max_sequence_length: int = LENGTH,
        height: int = SIZE,
        width: int = SIZE,
        **options: Any,
    ) -> Any:
        """As SD 3's; the prompt that guides away is empty."""
        return super().__call__(
            prompt,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            max_sequence_length=max_sequence_length,
            height=height,
            width=width,
            **options,
        )


def new_transformer() -> SD3Transformer2DModel:
    """The denoiser; the last block leaves the caption as it is, as in SD 3."""
    side = SIZE // 4
    return SD3Transformer2DModel(
        sample_size=side,
        pos_embed_max_size=side // PATCH,
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=BLOCKS,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        caption_projection_dim=HEAD * HEADS,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=2 * PROJECTED,
        qk_norm="rms_norm",
    )


def new_text_encoders(
    clip_tokenizer: Any, words: Any
) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel]:
    """Two CLIPs, which side by side are as wide as the T5 that follows them."""
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=TEXT_WIDTH // 2,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=PROJECTED,
        max_position_embeddings=clip_tokenizer.model_max_length,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    first, second = (CLIPTextModelWithProjection(config) for _ in range(2))
    return first, second, new_t5(words)


def embeds(models: dict[str, Any], captions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(tokens, pooled) of captions, as the pipeline makes them of its three encoders."""
    said = [models[name](captions[0], output_hidden_states=True) for name in ("clip", "clip_2")]
    clips = torch.cat([one.hidden_states[-2] for one in said], dim=-1)
    pooled = torch.cat([one.text_embeds for one in said], dim=-1)
    return torch.cat([clips, models["t5"](captions[1])[0]], dim=-2), pooled


def assemble(
    vae: AutoencoderTiny,
    transformer: SD3Transformer2DModel,
    encoders: tuple[Any, Any, Any],
    tokenizers: tuple[Any, Any],
) -> Emoji3Pipeline:
    """The parts as a silent pipeline."""
    pipeline = Emoji3Pipeline(
        transformer=transformer,
        scheduler=new_scheduler(),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[0],
        text_encoder_3=encoders[2],
        tokenizer_3=tokenizers[1],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(folder: Path, dtype: torch.dtype | None = None) -> Emoji3Pipeline:
    """The pipeline in `folder`, in `dtype` (float32 by default; the files are float16)."""
    pipeline = Emoji3Pipeline.from_pretrained(
        folder,
        vae=AutoencoderTiny.from_pretrained(folder.parent / "base" / "vae"),
        local_files_only=True,
    )
    pipeline.to(dtype=dtype or torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
