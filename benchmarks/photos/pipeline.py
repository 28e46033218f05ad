"""The parts of the base: an autoencoder of two halvings, a UNet, and MiniLM as it is."""

from __future__ import annotations

from pathlib import Path

import minilm.pipeline
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from toybox.pipeline import load_autoencoder

TEXT_WIDTH = 384


def new_unet(width: int = 96) -> UNet2DConditionModel:
    """9 M parameters, 2.5 M at half the width: attention at 8 x 8 as in SDXL, none at 16 x 16."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        norm_num_groups=width // 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def load(unet: Path, vae: Path) -> StableDiffusionPipeline:
    """The pipeline of both folders, float32, without a progress bar."""
    return minilm.pipeline.load(unet, load_autoencoder(vae))
