"""Transformers that draw pictures, FLUX's kin excepted."""

from . import references as given
from . import texts
from .parts import model_of_class
from .reduced import Reduced


def _sd3(x_block_self_attn_layers):
    text = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
    return model_of_class(
        "SD3", in_channels=16, out_channels=16, patch_size=2, depth=2, input_size=None,
        adm_in_channels=128, context_embedder_config=text, num_patches=36, pos_embed_max_size=6,
        pos_embed_scaling_factor=None, qk_norm="rms", context_size=4096,
        x_block_self_attn_layers=x_block_self_attn_layers,
    )  # fmt: skip


def sd3():
    return _sd3([]), texts.sd3(t5=True)


def sd35_medium():
    """A second attention of the picture alone in its first blocks; without T5, as many load it."""
    return _sd3([0]), texts.sd3(t5=False)


def aura_flow():
    model = model_of_class(
        "AuraFlow", dim=128, n_layers=3, n_double_layers=1, n_heads=2, global_conddim=128,
        cond_seq_dim=64, max_seq=64, in_channels=4, out_channels=4, patch_size=2,
    )  # fmt: skip
    return model, texts.aura()


_NEXT_DIT = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "cap_feat_dim": 64, "n_layers": 2,
    "qk_norm": True, "n_refiner_layers": 1, "axes_lens": [300, 512, 512],
}  # fmt: skip


def lumina2():
    model = model_of_class(
        "Lumina2", **_NEXT_DIT, dim=96, n_heads=2, n_kv_heads=1, axes_dims=[16, 16, 16],
        rope_theta=10000.0, ffn_dim_multiplier=4.0,
    )  # fmt: skip
    return model, texts.gemma()


def zimage():
    """Text and picture are filled up to multiples of 32 tokens."""
    model = model_of_class(
        "ZImage", **_NEXT_DIT, dim=256, n_heads=4, n_kv_heads=4, axes_dims=[16, 24, 24],
        rope_theta=256.0, ffn_dim_multiplier=2.0, z_image_modulation=True, time_scale=1000.0,
        pad_tokens_multiple=32,
    )  # fmt: skip
    return model, texts.qwen3("z_image", "ZImageTokenizer", "qwen3_4b")


def zimage_pixel():
    """Of pixels; a small network draws each patch."""
    model = model_of_class(
        "ZImagePixelSpace", **{**_NEXT_DIT, "image_model": "zimage_pixel", "patch_size": 16,
        "in_channels": 3}, dim=256, n_heads=4, n_kv_heads=4, axes_dims=[16, 24, 24],
        rope_theta=256.0, ffn_dim_multiplier=2.0, z_image_modulation=True, time_scale=1000.0,
        pad_tokens_multiple=32, decoder_hidden_size=64, decoder_num_res_blocks=1,
        decoder_max_freqs=4,
    )  # fmt: skip
    return model, texts.qwen3("z_image", "ZImageTokenizer", "qwen3_4b")


def qwen():
    """A text encoder that gives a mask for some texts and none for others."""
    model = model_of_class(
        "QwenImage", image_model="qwen_image", in_channels=64, num_layers=2, attention_head_dim=48,
        num_attention_heads=2, joint_attention_dim=64, axes_dims_rope=(16, 16, 16),
    )  # fmt: skip
    return model, texts.qwen25("qwen_image", "QwenImageTokenizer")


def hunyuan_image():
    """With a text encoder of its own for what is in quotes."""
    model = model_of_class(
        "HunyuanImage21", image_model="hunyuan_video", in_channels=64, out_channels=64,
        vec_in_dim=None, context_in_dim=64, hidden_size=96, mlp_ratio=4.0, num_heads=2, depth=1,
        depth_single_blocks=1, axes_dim=[24, 24], theta=256, patch_size=[1, 1], qkv_bias=True,
        guidance_embed=False, byt5=True, meanflow=False, use_cond_type_embedding=False,
        vision_in_dim=None, meanflow_sum=False,
    )  # fmt: skip
    return model, texts.qwen25("hunyuan_image", "HunyuanImageTokenizer")


def hidream():
    """Experts, each of which sees some tokens of all rows."""
    model = model_of_class(
        "HiDream", image_model="hidream", attention_head_dim=128, axes_dims_rope=[64, 32, 32],
        caption_channels=[64, 64], max_resolution=[128, 128], in_channels=16, llama_layers=[0, 1],
        num_attention_heads=1, num_routed_experts=4, num_activated_experts=2, num_layers=1,
        num_single_layers=1, out_channels=16, patch_size=2, text_emb_dim=128,
    )  # fmt: skip
    return model, texts.hidream()


def omnigen2():
    model = model_of_class(
        "Omnigen2", image_model="omnigen2", in_channels=16, hidden_size=96, num_layers=2,
        num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=32,
        axes_dim_rope=(16, 16, 16), axes_lens=(300, 512, 512), text_feat_dim=64,
        timestep_scale=1000.0,
    )  # fmt: skip
    return model, texts.qwen25("omnigen2", "Omnigen2Tokenizer", "3b")


KANDINSKY5 = {
    "image_model": "kandinsky5", "model_dim": 96, "in_visual_dim": 16, "out_visual_dim": 16,
    "in_text_dim": 64, "in_text_dim2": 64, "time_dim": 64, "ff_dim": 128, "num_text_blocks": 1,
    "num_visual_blocks": 2, "axes_dims": (16, 16, 16),
}  # fmt: skip


def kandinsky5_image():
    config = {**KANDINSKY5, "visual_embed_dim": 64, "rope_scale_factor": (1.0, 1.0, 1.0)}
    clip = texts.qwen25("kandinsky5", "Kandinsky5TokenizerImage")
    return model_of_class("Kandinsky5Image", **config), clip


BYT5 = {"apart": ("byt5_in.",), "left_out": "byt5_in: only texts with quotes reach it"}
PICTURES = {
    "SD 3": Reduced(sd3, slow=True),
    "SD 3.5 medium": Reduced(sd35_medium, slow=True),
    "AuraFlow": Reduced(aura_flow),
    "Lumina 2": Reduced(lumina2),
    "Z-Image": Reduced(zimage),
    "Z-Image in pixels": Reduced(zimage_pixel, side=64, slow=True),
    "Qwen-Image": Reduced(qwen),
    "Qwen-Image-Edit": Reduced(qwen, entries=given.edited(16, 1, 6, 6)),
    "HunyuanImage 2.1": Reduced(hunyuan_image, **BYT5),
    "HiDream": Reduced(
        hidream, apart=(".experts.",), left_out="experts: each sees some tokens of all rows at once"
    ),
    "OmniGen 2": Reduced(omnigen2, entries=given.edited(16, 6, 6)),
    "Kandinsky 5 image": Reduced(kandinsky5_image),
}
