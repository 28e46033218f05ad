"""UNets, and the two stages of Stable Cascade."""

from __future__ import annotations

from typing import Any

from . import texts
from .parts import model_of, model_of_class

_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "use_checkpoint": False,
    "legacy": False,
}
_SDXL = {
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_linear_in_transformer": True,
}


def unet(kind: str, **config: Any) -> Any:
    """A UNet of a class of ``comfy.supported_models`` with heads that fit its width."""
    import comfy.supported_models

    plain = getattr(comfy.supported_models, kind)
    extra = {**plain.unet_extra_config, "num_heads": -1, "num_head_channels": 32}
    small = type(kind, (plain,), {"unet_extra_config": extra})
    return model_of(small({**_UNET, **config}))


def sd15() -> tuple[Any, Any]:
    return unet("SD15", context_dim=64, use_linear_in_transformer=False), _clip_l()


def sd15_inpainting() -> tuple[Any, Any]:
    """A mask and a picture beside the latents."""
    model = unet("SD15", context_dim=64, use_linear_in_transformer=False, in_channels=9)
    return model, _clip_l()


def sd15_instructpix2pix() -> tuple[Any, Any]:
    """The picture to be edited beside the latents."""
    kind = "SD15_instructpix2pix"
    return unet(kind, context_dim=64, use_linear_in_transformer=False, in_channels=8), _clip_l()


def sd2() -> tuple[Any, Any]:
    options = {"clip_h_model_config": texts.CLIP}
    clip = texts.clip("comfy.text_encoders.sd2_clip", "SD2Tokenizer", "SD2ClipModel", **options)
    return unet("SD20", context_dim=64, use_linear_in_transformer=True), clip


def sdxl() -> tuple[Any, Any]:
    """With its text encoders' own widths, which diffusers' pipelines of it have too."""
    return unet("SDXL", **_SDXL), _two_clips(texts.FULL_CLIP)


def sdxl_inpainting() -> tuple[Any, Any]:
    narrow = {"context_dim": 128, "adm_in_channels": 64 + 6 * 256, "in_channels": 9}
    return unet("SDXL", **{**_SDXL, **narrow}), _two_clips(texts.CLIP)


def sdxl_refiner() -> tuple[Any, Any]:
    options = {"clip_g_model_config": texts.CLIP}
    clip = texts.clip("comfy.sdxl_clip", "SDXLTokenizer", "SDXLRefinerClipModel", **options)
    config = {**_SDXL, "context_dim": 64, "adm_in_channels": 64 + 5 * 256}
    return unet("SDXLRefiner", **config), clip


def cascade_c() -> tuple[Any, Any]:
    config = {
        "stable_cascade_stage": "c",
        "c_cond": 64,
        "c_hidden": [64, 64],
        "c_clip_text": 64,
        "c_clip_text_pooled": 64,
        "nhead": [2, 2],
        "blocks": [[1, 1], [1, 1]],
    }
    return model_of_class("Stable_Cascade_C", **config), _cascade_clip()


def cascade_b() -> tuple[Any, Any]:
    """Only its pooled text is used, and the prior of stage C where there is one."""
    config = {
        "stable_cascade_stage": "b",
        "c_cond": 64,
        "c_clip": 64,
        "c_hidden": [32, 64],
        "nhead": [-1, 2],
        "blocks": [[1, 1], [1, 1]],
        "block_repeat": [[1, 1], [2, 2]],
        "level_config": ["CT", "CTA"],
    }
    return model_of_class("Stable_Cascade_B", **config), _cascade_clip()


def _clip_l() -> Any:
    options = {"clip_l_model_config": texts.CLIP}
    return texts.clip("comfy.sd1_clip", "SD1Tokenizer", "SD1ClipModel", **options)


def _two_clips(widths: Any) -> Any:
    options = {"clip_l_model_config": widths, "clip_g_model_config": widths}
    return texts.clip("comfy.sdxl_clip", "SDXLTokenizer", "SDXLClipModel", **options)


def _cascade_clip() -> Any:
    options = {"clip_g_model_config": texts.CLIP}
    name = "StableCascadeTokenizer", "StableCascadeClipModel"
    return texts.clip("comfy.sdxl_clip", *name, **options)
