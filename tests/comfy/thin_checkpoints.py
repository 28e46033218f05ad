"""The models and LoRAs that the example workflows ask for, under their names: thin and random.

ComfyUI's stock loaders tell SDXL by the widths of its attention and FLUX by 24 heads of 128, so
that blocks are left out rather than widths. Text encoders are as small as :data:`THIN_ENCODERS`, a
custom node, has them made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from reduced_models import write_lora
from safetensors.torch import save_file
from thin_models import _checkpoint, _fill, thin_pipeline
from torch import Tensor

CLIP_G = {"num_hidden_layers": 3}  # of which the last but one is shown
T5 = {"num_layers": 1, "d_model": 256, "d_ff": 256, "num_heads": 4}
THIN_ENCODERS = f"""
import comfy.sd1_clip

_make = comfy.sd1_clip.SDClipModel.__init__
_SIZES = {{"clip_g": {CLIP_G!r}, "t5xxl": {T5!r}}}


def _thin(self, *args, model_options={{}}, **more):
    name = model_options.get("model_name", "")
    sizes = {{f"{{name}}_model_config": _SIZES.get(name, {{}})}}
    _make(self, *args, model_options={{**model_options, **sizes}}, **more)


comfy.sd1_clip.SDClipModel.__init__ = _thin
NODE_CLASS_MAPPINGS = {{}}
"""
"""A custom node for the server."""

_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
_FLUX = {
    "lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072),
    "lora_unet_double_blocks_0_txt_attn_proj": (3072, 3072),
}


def write_workflow_models(folder: Path) -> None:
    """checkpoints, diffusion_models, text_encoders, vae and loras below ``folder``."""
    for name in ("checkpoints", "diffusion_models", "text_encoders", "vae", "loras"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pipeline = thin_pipeline()
    sd15 = _checkpoint(pipeline)
    save_file(sd15, folder / "checkpoints" / "v1-5-pruned-emaonly-fp16.safetensors")
    _write_unet_loras(pipeline.unet, folder / "loras", "my_cat", "my_dog")
    clip_l = _under("cond_stage_model.transformer.", sd15)
    unet, sdxl = _sdxl(clip_l)
    save_file(sdxl, folder / "checkpoints" / "sd_xl_base_1.0.safetensors")
    _write_unet_loras(unet, folder / "loras", "xl_cat", "xl_dog", "xl_style", "xl_detail")
    _write_flux(folder, clip_l)


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}


def _sdxl(clip_l: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """With as many transformer blocks as Segmind's Vega, and 320 channels on every level."""
    import comfy.taesd.taesd
    import comfy.utils
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(320, 320, 320), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), cross_attention_dim=2048, attention_head_dim=5,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    _fill(unet)
    config = {
        "num_res_blocks": [2, 2, 2], "channel_mult": [1, 1, 1],
        "transformer_depth": [0, 0, 1, 1, 2, 2], "transformer_depth_middle": 2,
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    }  # fmt: skip
    weights = unet.state_dict()
    state = {
        f"model.diffusion_model.{ours}": weights[theirs]
        for theirs, ours in comfy.utils.unet_to_diffusers(config).items()
        if theirs in weights
    }
    assert len(state) == len(weights)
    for key, tensor in clip_l.items():
        state[f"conditioner.embedders.0.transformer.{key}"] = tensor
    for key, tensor in _open_clip(1280, CLIP_G["num_hidden_layers"]).items():
        state[f"conditioner.embedders.1.model.{key}"] = tensor
    state |= {f"first_stage_model.{key}": t for key, t in _autoencoder(4).items()}
    return unet, {
        key: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for key, tensor in state.items()
    }


def _autoencoder(channels: int) -> dict[str, Tensor]:
    import comfy.taesd.taesd

    vae = comfy.taesd.taesd.TAESD(latent_channels=channels)
    _fill(vae)
    vae.vae_scale.data.fill_(1.0)
    vae.vae_shift.data.fill_(0.0)
    return vae.state_dict()


def _open_clip(width: int, layers: int) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, width), "token_embedding.weight": (49408, width),
        "ln_final.weight": (width,), "ln_final.bias": (width,), "text_projection": (width, width),
    }  # fmt: skip
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        for name, out, fan in (
            ("attn.out_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ):
            shapes |= {f"{block}.{name}.weight": (out, fan), f"{block}.{name}.bias": (out,)}
        shapes |= {
            f"{block}.ln_{n}.{part}": (width,) for n in (1, 2) for part in ("weight", "bias")
        }
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width)}
        shapes |= {f"{block}.attn.in_proj_bias": (3 * width,)}
    return _random(shapes)


def _random(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Matrices scaled by what a row of them reads, norms near one, biases near zero."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            made[key] = noise * (0.2 if "embedding" in key else shape[-1] ** -0.5)
        else:
            is_norm = ("norm" in key or "ln_" in key or "scale" in key) and not key.endswith("bias")
            made[key] = noise * 0.05 + (1.0 if is_norm else 0.0)
    return made


def _flux_shapes(width: int = 3072) -> dict[str, tuple[int, ...]]:
    """One block of each kind."""
    linear = {
        "img_in": (width, 64), "txt_in": (width, T5["d_model"]),
        "final_layer.linear": (64, width), "final_layer.adaLN_modulation.1": (2 * width, width),
        "single_blocks.0.modulation.lin": (3 * width, width),
        "single_blocks.0.linear1": (7 * width, width),
        "single_blocks.0.linear2": (width, 5 * width),
    }  # fmt: skip
    for name, fan in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        linear |= {f"{name}.in_layer": (width, fan), f"{name}.out_layer": (width, width)}
    scales = ["single_blocks.0.norm"]
    for part in ("double_blocks.0.img", "double_blocks.0.txt"):
        linear |= {
            f"{part}_mod.lin": (6 * width, width), f"{part}_attn.qkv": (3 * width, width),
            f"{part}_attn.proj": (width, width), f"{part}_mlp.0": (4 * width, width),
            f"{part}_mlp.2": (width, 4 * width),
        }  # fmt: skip
        scales.append(f"{part}_attn.norm")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | {f"{s}.{of}_norm.scale": (128,) for s in scales for of in ("query", "key")}


def _write_flux(folder: Path, clip_l: dict[str, Tensor]) -> None:
    import comfy.ops
    import comfy.text_encoders.t5

    eighth = {
        key: t.to(torch.float8_e4m3fn if t.ndim > 1 else torch.float16)
        for key, t in _random(_flux_shapes()).items()
    }
    save_file(eighth, folder / "diffusion_models" / "flux1-dev-fp8.safetensors")
    save_file(clip_l, folder / "text_encoders" / "clip_l.safetensors")
    file = Path(comfy.text_encoders.t5.__file__).with_name("t5_config_xxl.json")
    with torch.device("meta"):
        encoder = comfy.text_encoders.t5.T5(
            {**json.loads(file.read_text()), **T5}, None, "meta", comfy.ops.disable_weight_init
        )
    shapes = {key: tuple(t.shape) for key, t in encoder.state_dict().items()}
    half = {key: t.half() for key, t in _random(shapes).items()}
    save_file(half, folder / "text_encoders" / "t5xxl_fp8_e4m3fn.safetensors")
    save_file(_autoencoder(16), folder / "vae" / "ae.safetensors")
    for seed, name in enumerate(("flux_cat", "flux_dog"), 1):
        write_lora(folder / "loras" / f"{name}.safetensors", _FLUX, seed, alpha=4.0)


def _write_unet_loras(unet: Any, folder: Path, *names: str) -> None:
    sites = {
        f"lora_unet_{name.replace('.', '_')}": tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if name.endswith(_ATTENTION)
    }
    for seed, name in enumerate(names, 1):
        write_lora(folder / f"{name}.safetensors", sites, seed, alpha=4.0)
