"""Random checkpoints that ComfyUI takes for SD 1.5, the same weights for diffusers, and LoRAs."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from reduced_models import write_lora
from safetensors.torch import save_file
from torch import Tensor, nn

_KINDS = (".to_q", ".to_k", ".to_v", ".to_out.0")
_TEXT = "text_encoder.text_model.encoder.layers.0.self_attn."


def thin_pipeline() -> Any:
    """SD 1.5 with one level and one block of 320 channels; weights as float16 holds them."""
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(
        Path(os.environ["COMFYUI_PATH"]) / "comfy/sd1_tokenizer"
    )
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, projection_dim=768, num_hidden_layers=12,
        num_attention_heads=12, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    )  # fmt: skip
    unet = UNet(
        sample_size=8, block_out_channels=(320,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=768, attention_head_dim=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    text_encoder = CLIPTextModel(config).eval()
    for module in (unet, text_encoder):
        _fill(module)
    return StableDiffusionPipeline(
        vae=AutoencoderTiny(), unet=unet.eval(), text_encoder=text_encoder, tokenizer=tokenizer,
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    """Weights of random models come out too small to tell anything apart."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(module.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:
            value = noise * 0.05 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif "embedding" in name:
            value = noise * 0.2
        else:
            value = noise / weight[0].numel() ** 0.5
        weight.copy_(value.half())


def write_models(folder: Path) -> None:
    """checkpoints/thin.safetensors, loras/a.safetensors (kohya) and b.safetensors (diffusers)."""
    for name in ("checkpoints", "loras", "embeddings", "clip_vision", "text_encoders"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pipeline = thin_pipeline()
    save_file(_checkpoint(pipeline), folder / "checkpoints" / "thin.safetensors")
    _write_loras(pipeline, folder / "loras")


def load_thin(base: Path, **options: Any) -> tuple[Any, Any]:
    """MODEL and CLIP of the thin checkpoint, the text encoder in float32."""
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(
            str(base / "models" / "checkpoints" / "thin.safetensors"),
            te_model_options={"dtype": torch.float32},
            **options,
        )[:2]


def _checkpoint(pipeline: Any) -> dict[str, Tensor]:
    import comfy.taesd.taesd
    import comfy.utils

    config = {
        "num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1],
        "transformer_depth_output": [1, 1], "transformer_depth_middle": 1,
    }  # fmt: skip
    unet = pipeline.unet.state_dict()
    state = {
        f"model.diffusion_model.{ours}": unet[theirs]
        for theirs, ours in comfy.utils.unet_to_diffusers(config).items()
        if theirs in unet
    }
    assert len(state) == len(unet)
    for name, weight in pipeline.text_encoder.state_dict().items():
        name = name.removeprefix("text_model.")
        state[f"cond_stage_model.transformer.text_model.{name}"] = weight
    vae = comfy.taesd.taesd.TAESD()
    _fill(vae)
    vae.vae_scale.data.fill_(1.0)
    vae.vae_shift.data.fill_(0.0)
    state |= {f"first_stage_model.{name}": weight for name, weight in vae.state_dict().items()}
    return {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def _write_loras(pipeline: Any, folder: Path) -> None:
    """One as sd-scripts writes it, one as today's diffusers does: no ``text_model`` in the names,
    and the alpha in the metadata only."""
    shapes = {
        f"unet.{name}": tuple(module.weight.shape)
        for name, module in pipeline.unet.named_modules()
        if name.endswith(_KINDS)
    }
    shapes |= {f"{_TEXT}{kind}": (768, 768) for kind in ("q_proj", "v_proj")}
    kohya = {f"lora_{site.replace('text_encoder.', 'te.').replace('.', '_')}": shape
             for site, shape in shapes.items()}  # fmt: skip
    theirs = {site.replace(".text_model.", "."): shape for site, shape in shapes.items()}
    config = {f"{part}.{key}": value for part in ("unet", "text_encoder")
              for key, value in {"r": 4, "lora_alpha": 8}.items()}  # fmt: skip
    targets = {"unet.target_modules": ["to_q"], "text_encoder.target_modules": ["q_proj"]}
    metadata = {"lora_adapter_metadata": json.dumps(config | targets)}
    dirs = {"ss_dataset_dirs": json.dumps({"10_sks cat": {"n_repeats": 10}})}
    write_lora(folder / "a.safetensors", kohya, 1, alpha=8.0, metadata=dirs)
    write_lora(folder / "b.safetensors", theirs, 2, metadata=metadata)
