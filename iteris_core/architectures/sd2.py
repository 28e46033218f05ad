"""SD 2.x"""

from .unet import stable_diffusion

ARCHITECTURE = stable_diffusion(
    "sd2",
    "SD 2.x",
    {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    encoders=((1024, 23, False),),
    clips=("clip_h",),
    version="sd_v2",
    modelspec="stable-diffusion-v2-512",
    single_files=("v2",),
)
