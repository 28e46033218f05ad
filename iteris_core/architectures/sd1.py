"""SD 1.x"""

from .unet import stable_diffusion

ARCHITECTURE = stable_diffusion(
    "sd1", "SD 1.x", {"cross_attention_dim": 768}, version="sd_v1",
    modelspec="stable-diffusion-v1", single_files=("v1",),
)  # fmt: skip
