"""The parts of the base: an autoencoder of two halvings, a UNet, and MiniLM as it is."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from minilm.pipeline import LENGTH, TokenStates, encoder_folder
from transformers import BertTokenizerFast

import toybox.pipeline

TEXT_WIDTH = 384


def new_unet(channels: tuple[int, int] = (96, 192)) -> UNet2DConditionModel:
    """9 to 10 M parameters at (96, 192): attention at 8 x 8 as in SDXL, none at 16 x 16."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=32,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def load_autoencoder(folder: Path) -> AutoencoderTiny:
    """Float32 and ready to encode; the file is float16."""
    vae = AutoencoderTiny.from_pretrained(folder).float().eval().requires_grad_(False)
    return vae.to(memory_format=torch.channels_last)


def load_encoder() -> TokenStates:
    return TokenStates.from_pretrained(encoder_folder(), add_pooling_layer=False).eval()


def load_tokenizer() -> BertTokenizerFast:
    return BertTokenizerFast.from_pretrained(encoder_folder(), model_max_length=LENGTH)


def load(folder: Path) -> StableDiffusionPipeline:
    """The pipeline of ``folder``/vae and ``folder``/unet, float32, without a progress bar."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    vae = load_autoencoder(folder / "vae")
    return toybox.pipeline.assemble(vae, unet.eval(), load_encoder(), load_tokenizer())
