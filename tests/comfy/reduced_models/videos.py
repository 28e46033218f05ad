"""Transformers that draw videos."""

from . import references as given
from . import texts
from .parts import model_of_class
from .pictures import BYT5, KANDINSKY5
from .reduced import Reduced

_HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": 64,
    "context_in_dim": 64, "hidden_size": 96, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1,
    "depth_single_blocks": 1, "axes_dim": [16, 16, 16], "theta": 256, "patch_size": [1, 2, 2],
    "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False,
    "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip


def hunyuan_video(kind="HunyuanVideo", **other):
    return model_of_class(kind, **{**_HUNYUAN, **other}), texts.hunyuan_video()


def hunyuan_video15():
    config = {
        **_HUNYUAN, "in_channels": 65, "out_channels": 32, "vec_in_dim": None,
        "patch_size": [1, 1, 1], "guidance_embed": False, "byt5": True,
        "use_cond_type_embedding": True, "vision_in_dim": 64, "meanflow_sum": True,
    }  # fmt: skip
    clip = texts.qwen25("hunyuan_video", "HunyuanVideo15Tokenizer")
    return model_of_class("HunyuanVideo15", **config), clip


def hunyuan_video15_sr():
    """The small video and its mask beside the latents, and the first frame."""
    config = {
        **_HUNYUAN, "in_channels": 98, "out_channels": 32, "vec_in_dim": None,
        "patch_size": [1, 1, 1], "guidance_embed": False, "byt5": True, "meanflow": True,
        "use_cond_type_embedding": True, "vision_in_dim": 64, "meanflow_sum": True,
    }  # fmt: skip
    clip = texts.qwen25("hunyuan_video", "HunyuanVideo15Tokenizer")
    return model_of_class("HunyuanVideo15_SR_Distilled", **config), clip


def ltxv():
    model = model_of_class(
        "LTXV", image_model="ltxv", in_channels=128, cross_attention_dim=64, attention_head_dim=32,
        num_attention_heads=2, caption_channels=64, num_layers=2,
        positional_embedding_theta=10000.0, positional_embedding_max_pos=[20, 2048, 2048],
        causal_temporal_positioning=False, vae_scale_factors=(8, 32, 32),
    )  # fmt: skip
    return model, texts.t5xxl("lt", "LTXVT5Tokenizer", "ltxv_te")


def cogvideox(**other):
    kind = "CogVideoX_I2V" if other else "CogVideoX_T2V"
    model = model_of_class(
        kind, image_model="cogvideox", num_attention_heads=1, time_embed_dim=64, text_embed_dim=64,
        num_layers=2, use_rotary_positional_embeddings=True, **other,
    )  # fmt: skip
    return model, texts.t5xxl("cogvideo", "CogVideoXTokenizer", "cogvideo_te")


def cogvideox_i2v():
    """The first frame beside the latents, and how far it is from the rest."""
    return cogvideox(in_channels=32, ofs_embed_dim=64)


def cogvideox_inpainting():
    model = model_of_class(
        "CogVideoX_Inpaint", image_model="cogvideox", num_attention_heads=1, time_embed_dim=64,
        text_embed_dim=64, num_layers=2, use_rotary_positional_embeddings=True, in_channels=48,
    )  # fmt: skip
    return model, texts.t5xxl("cogvideo", "CogVideoXTokenizer", "cogvideo_te")


def mochi():
    """Text tokens of padding are cut off by their number. Its class insists on a feed-forward of
    12288."""
    model = model_of_class(
        "GenmoMochi", image_model="mochi_preview", depth=2, patch_size=2, num_heads=2,
        hidden_size_x=96, hidden_size_y=64, mlp_ratio_x=128.0, mlp_ratio_y=4.0, learn_sigma=False,
        in_channels=12, qk_norm=True, qkv_bias=False, out_bias=True, attn_drop=0.0,
        patch_embed_bias=True, posenc_preserve_area=True, timestep_mlp_bias=True,
        attend_to_padding=False, timestep_scale=1000.0, use_t5=True, t5_feat_dim=64,
        t5_token_length=256, rope_theta=10000.0,
    )  # fmt: skip
    return model, texts.t5xxl("genmo", "MochiT5Tokenizer", "mochi_te")


def kandinsky5_video():
    model = model_of_class("Kandinsky5", **KANDINSKY5, visual_embed_dim=132)
    return model, texts.qwen25("kandinsky5", "Kandinsky5Tokenizer")


VIDEOS = {
    "HunyuanVideo": Reduced(hunyuan_video, video=True),
    "HunyuanVideo I2V": Reduced(
        lambda: hunyuan_video("HunyuanVideoI2V", in_channels=33), video=True,
        entries=given.first_frame(16, 3), slow=True,
    ),
    "SkyReels I2V": Reduced(
        lambda: hunyuan_video("HunyuanVideoSkyreelsI2V", in_channels=32),  # without a mask
        video=True,
        entries={"concat_latent_image": given.picture(16, 3, 8, 8)},
        slow=True,
    ),
    "HunyuanVideo 1.5": Reduced(
        hunyuan_video15, video=True, apart=("byt5_in.", "vision_in."),
        left_out=f"{BYT5['left_out']}; vision_in: only a first frame reaches it", slow=True,
    ),
    "HunyuanVideo 1.5 I2V": Reduced(
        hunyuan_video15, video=True, entries={**given.first_frame(32, 3), **given.seen(64)}, **BYT5,
    ),
    "HunyuanVideo 1.5 SR": Reduced(
        hunyuan_video15_sr, video=True, slow=True, apart=("byt5_in.", "time_r_in."),
        left_out=f"{BYT5['left_out']}; time_r_in: it gets one time for all rows",
        entries={"concat_latent_image": given.picture(66, 3, 8, 8), **given.seen(64)},
    ),
    "LTX-Video": Reduced(ltxv, video=True),
    "Mochi": Reduced(mochi, video=True),
    "CogVideoX": Reduced(cogvideox, video=True),
    "CogVideoX I2V": Reduced(
        cogvideox_i2v, video=True, entries={"concat_latent_image": given.picture(16, 3, 8, 8)},
        slow=True,
    ),
    "CogVideoX inpainting": Reduced(
        # A mask and what is kept.
        cogvideox_inpainting, video=True, slow=True,
        entries={"concat_latent_image": given.picture(32, 3, 8, 8)},
    ),
    "Kandinsky 5 video": Reduced(kandinsky5_video, video=True, slow=True),
}  # fmt: skip
