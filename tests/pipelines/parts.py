"""Schedulers, autoencoders and pictures that reduced pipelines share."""

from typing import Any

import diffusers
import torch

SIDE = {"height": 64, "width": 64}
TEXT = {"max_sequence_length": 96}


def flow(**options: Any):
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def autoencoder(channels: int = 4, levels: int = 4):
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * levels, latent_channels=channels, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * levels, shift_factor=0.1,
        up_block_types=("UpDecoderBlock2D",) * levels, mid_block_add_attention=False,
    )  # fmt: skip


def qwen_autoencoder():
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4,
        latents_std=[1.2] * 4,
    )  # fmt: skip


def widened(model: Any, **channels: int) -> Any:
    """A new model of the same configuration but for its channels."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return type(model)(**{**config, **channels})


def picture(side: int = 64, seed: int = 9):
    """A smooth random picture."""
    from PIL import Image

    noise = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(noise[None], size=(side, side), mode="bilinear")[0]
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy())


def mask(side: int = 64):
    from PIL import Image

    pixels = torch.zeros(side, side, dtype=torch.uint8)
    pixels[side // 4 : side // 2, side // 4 :] = 255
    return Image.fromarray(pixels.numpy())
