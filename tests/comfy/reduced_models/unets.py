"""UNets, and the two stages of Stable Cascade."""

from . import references as given
from . import texts
from .parts import model_of_class
from .reduced import Reduced

_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "channel_mult": [1, 2], "num_res_blocks": [1, 1], "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1,
    "use_spatial_transformer": True, "use_temporal_attention": False, "use_checkpoint": False,
    "legacy": False,
}  # fmt: skip
_SDXL = {
    "context_dim": 2048, "adm_in_channels": 2816, "num_classes": "sequential",
    "use_linear_in_transformer": True,
}  # fmt: skip
_SDXL_NARROW = {**_SDXL, "context_dim": 128, "adm_in_channels": 64 + 6 * 256}


def unet(kind, extra=None, **config):
    """A UNet with heads that fit its width."""
    heads = {"num_heads": -1, "num_head_channels": 32}
    return model_of_class(kind, {**heads, **(extra or {})}, **{**_UNET, **config})


def sd15(kind="SD15", widths=texts.CLIP, **other):
    """``widths`` are those of its text encoder."""
    config = {"context_dim": widths.get("hidden_size", 768), "use_linear_in_transformer": False}
    options = {"clip_l_model_config": widths}
    clip = texts.clip("comfy.sd1_clip", "SD1Tokenizer", "SD1ClipModel", **options)
    return unet(kind, **config, **other), clip


def svd():
    """Of a picture alone."""
    return unet(
        "SVD_img2vid", in_channels=8, adm_in_channels=768, num_classes="sequential",
        context_dim=64, use_linear_in_transformer=True, use_temporal_attention=True,
        use_temporal_resblock=True, video_kernel_size=[3, 1, 1], merge_factor=0.0,
        merge_strategy="learned_with_images",
    ), sd15()[1]  # fmt: skip


def sd15_inpainting():
    """A mask and a picture beside the latents."""
    return sd15(in_channels=9)


def sd2():
    return unet("SD20", context_dim=64, use_linear_in_transformer=True), _clip_h()


def sd21_unclip():
    """A picture as CLIP sees it beside the time."""
    config = {"context_dim": 64, "adm_in_channels": 2 * 768, "num_classes": "sequential"}
    return unet("SD21UnclipL", **config, use_linear_in_transformer=True), _clip_h()


def sd_x4_upscaler():
    """The small picture beside the latents; its outer blocks see the text twice, not themselves."""
    model = unet(
        "SD_X4Upscaler", {"disable_self_attentions": [True, False]}, context_dim=64, in_channels=7,
        transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1],
        use_linear_in_transformer=True,
    )  # fmt: skip
    return model, _clip_h()


def sdxl():
    """With its text encoders' own widths, which diffusers' pipelines of it have too."""
    return unet("SDXL", **_SDXL), _two_clips(texts.FULL_CLIP)


def sdxl_narrow(kind="SDXL", **other):
    return unet(kind, **{**_SDXL_NARROW, **other}), _two_clips(texts.CLIP)


def sdxl_refiner():
    options = {"clip_g_model_config": texts.CLIP}
    clip = texts.clip("comfy.sdxl_clip", "SDXLTokenizer", "SDXLRefinerClipModel", **options)
    config = {**_SDXL, "context_dim": 64, "adm_in_channels": 64 + 5 * 256}
    return unet("SDXLRefiner", **config), clip


def cascade_c():
    config = {
        "stable_cascade_stage": "c", "c_cond": 64, "c_hidden": [64, 64], "c_clip_text": 64,
        "c_clip_text_pooled": 64, "nhead": [2, 2], "blocks": [[1, 1], [1, 1]],
    }  # fmt: skip
    return model_of_class("Stable_Cascade_C", **config), _cascade_clip()


def cascade_b():
    """Only its pooled text is used, and the prior of stage C where there is one."""
    config = {
        "stable_cascade_stage": "b", "c_cond": 64, "c_clip": 64, "c_hidden": [32, 64],
        "nhead": [-1, 2], "blocks": [[1, 1], [1, 1]], "block_repeat": [[1, 1], [2, 2]],
        "level_config": ["CT", "CTA"],
    }  # fmt: skip
    return model_of_class("Stable_Cascade_B", **config), _cascade_clip()


def _clip_h():
    options = {"clip_h_model_config": texts.CLIP}
    return texts.clip("comfy.text_encoders.sd2_clip", "SD2Tokenizer", "SD2ClipModel", **options)


def _two_clips(widths):
    options = {"clip_l_model_config": widths, "clip_g_model_config": widths}
    return texts.clip("comfy.sdxl_clip", "SDXLTokenizer", "SDXLClipModel", **options)


def _cascade_clip():
    options = {"clip_g_model_config": texts.CLIP}
    name = "StableCascadeTokenizer", "StableCascadeClipModel"
    return texts.clip("comfy.sdxl_clip", *name, **options)


_SSD = {
    "transformer_depth": [0, 2],
    "transformer_depth_output": [0, 0, 1, 2],
    "transformer_depth_middle": -1,  # no attention; KOALA has no block there at all
}
UNETS = {
    "SD 1.5": Reduced(sd15),
    "SD 1.5 inpainting": Reduced(sd15_inpainting, entries=given.inpainted(4), slow=True),
    "InstructPix2Pix": Reduced(
        lambda: sd15("SD15_instructpix2pix", in_channels=8), entries=given.beside(4), slow=True
    ),
    "SD 2": Reduced(sd2, slow=True),
    "SD 2.1 unCLIP": Reduced(sd21_unclip, entries=given.unclip(768), slow=True),
    "SD x4 upscaler": Reduced(
        sd_x4_upscaler, entries={"concat_image": given.picture(3, 8, 8)}, slow=True
    ),
    "SDXL": Reduced(sdxl_narrow),
    "SDXL inpainting": Reduced(
        lambda: sdxl_narrow(in_channels=9), entries=given.inpainted(4), slow=True
    ),
    "SDXL InstructPix2Pix": Reduced(
        lambda: sdxl_narrow("SDXL_instructpix2pix", in_channels=8),
        entries=given.beside(4),
        slow=True,
    ),
    "SDXL refiner": Reduced(sdxl_refiner, slow=True),
    "SSD-1B": Reduced(lambda: sdxl_narrow("SSD1B", **_SSD), slow=True),
    "Segmind Vega": Reduced(
        lambda: sdxl_narrow("Segmind_Vega", **{**_SSD, "transformer_depth_output": [0, 0, 1, 1]}),
        slow=True,
    ),
    "KOALA": Reduced(lambda: sdxl_narrow("KOALA_700M", transformer_depth_middle=-2), slow=True),
    "Stable Cascade C": Reduced(cascade_c),
    "Stable Cascade B": Reduced(
        cascade_b, side=16, entries=given.prior(), settings={"schedule": "jacobi"}, slow=True
    ),
}
