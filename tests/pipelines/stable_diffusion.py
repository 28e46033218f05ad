"""Reduced Stable Diffusion: 1.5, 2, XL, 3, and those that inpaint."""

from typing import Any

import diffusers
import torch
from bases import make_sd3, make_sdxl
from tiny import make_pipeline

from . import texts
from .parts import SIDE, TEXT, autoencoder, mask, picture, widened
from .reduced import Reduced


def unet(**options: Any):
    """SD's, for other channels or a text encoder of another width."""
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32,
            "attention_head_dim": 4, "norm_num_groups": 8, **options,
        }
    )  # fmt: skip


def sd() -> Reduced:
    return Reduced(make_pipeline(), {**SIDE, "guidance_scale": 4.0})


def sd2() -> Reduced:
    pipeline = diffusers.StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=texts.clip(), tokenizer=texts.clip_words(),
        unet=unet(use_linear_projection=True, attention_head_dim=(2, 4)),
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return Reduced(pipeline, SIDE)


def sd_inpainting() -> Reduced:
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        vae=autoencoder(), text_encoder=texts.clip(), tokenizer=texts.clip_words(),
        unet=unet(in_channels=9, out_channels=4), scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, "image": picture(), "mask_image": mask()})


def instruct_pix2pix() -> Reduced:
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=autoencoder(), text_encoder=texts.clip(), tokenizer=texts.clip_words(),
        unet=unet(in_channels=8, out_channels=4), scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return Reduced(pipeline, {"image": picture()})


def sd_controlnet() -> Reduced:
    """Its pictures of every step are not recorded."""
    parts = make_pipeline().components
    control = diffusers.ControlNetModel.from_unet(parts["unet"])
    for weight in control.parameters():  # those of its last layers begin at zero
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    pipeline = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=control)
    return Reduced(pipeline, {**SIDE, "image": picture(), "guidance_scale": 4.0})


def sdxl() -> Reduced:
    return Reduced(make_sdxl(layers=1), SIDE)


def sdxl_inpainting() -> Reduced:
    parts = make_sdxl(1, (1, 1)).components
    parts["unet"] = widened(parts["unet"], in_channels=9, out_channels=4)
    pipeline = diffusers.StableDiffusionXLInpaintPipeline(**{**parts, "vae": autoencoder()})
    call = {**SIDE, "image": picture(), "mask_image": mask(), "strength": 1.0}
    return Reduced(pipeline, call)


def sdxl_instruct_pix2pix() -> Reduced:
    parts = make_sdxl(1, (1, 1)).components
    parts["unet"] = widened(parts["unet"], in_channels=8, out_channels=4)
    del parts["image_encoder"], parts["feature_extractor"]
    pipeline = diffusers.StableDiffusionXLInstructPix2PixPipeline(**{**parts, "vae": autoencoder()})
    return Reduced(pipeline, {**SIDE, "image": picture()})


def sd3() -> Reduced:
    return Reduced(make_sd3(), {**SIDE, **TEXT})


STABLE_DIFFUSION = {
    "SD 1.5": sd,
    "SD 2": sd2,
    "SD inpainting": sd_inpainting,
    "InstructPix2Pix": instruct_pix2pix,
    "SDXL": sdxl,
    "SDXL inpainting": sdxl_inpainting,
    "SDXL InstructPix2Pix": sdxl_instruct_pix2pix,
    "SD 3": sd3,
}
