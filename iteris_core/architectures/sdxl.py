"""SDXL"""

from __future__ import annotations

from . import unet

ARCHITECTURE = unet.stable_diffusion(
    "sdxl",
    "SDXL",
    {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    encoders=((768, 12, False), (1280, 32, True)),
    native=True,
    version="sdxl_base_v1-0",
    modelspec="stable-diffusion-xl-v1-base",
    pipeline="StableDiffusionXLPipeline",
    single_files=("xl_base", "playground-v2-5"),
)
