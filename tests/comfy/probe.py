"""Run by ComfyUI's own Python: what stock LoraLoader makes of a file.

``probe.py COMFYUI KIND LORA OUT``: keys that match nothing, and ΔW x by diffusers' weight name
(with ComfyUI's own conversion tables) for a few fixed x, of real SD 1.5, SDXL, SD 3 and FLUX
without weights; with ``keys`` behind it, the keys only.
``probe.py COMFYUI CHECKPOINT LORA OUT``: outputs of the text encoder and UNet of a checkpoint.
"""

# ruff: noqa: E402
import json
import logging
import sys

sys.path.insert(0, sys.argv[1])
import comfy.cli_args

comfy.cli_args.args.cpu = True
import comfy.lora
import comfy.lora_convert
import comfy.model_detection
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.flux.model import FluxParams
from safetensors.torch import load_file, save_file

UNET = {
    "use_checkpoint": False, "image_size": 32, "out_channels": 4, "use_spatial_transformer": True,
    "legacy": False, "in_channels": 4, "model_channels": 320, "dtype": torch.float32,
    "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
CONFIGS = {
    "sd1": {
        **UNET, "adm_in_channels": None, "num_res_blocks": [2] * 4, "num_heads": 8,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "channel_mult": [1, 2, 4, 4],
        "transformer_depth_middle": 1, "use_linear_in_transformer": False, "context_dim": 768,
        "transformer_depth_output": [1] * 9 + [0] * 3,
    },
    "sdxl": {
        **UNET, "num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [2] * 3,
        "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 2, 4],
        "transformer_depth_middle": 10, "use_linear_in_transformer": True, "context_dim": 2048,
        "num_head_channels": 64, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    },
    "sd3": {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 24, "input_size": None,
        "adm_in_channels": 2048, "pos_embed_scaling_factor": None, "pos_embed_max_size": 192,
        "num_patches": 192 * 192, "x_block_self_attn_layers": [],
        "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
    },
    "flux": {
        "image_model": "flux", "axes_dim": [16, 56, 56], "num_heads": 24, "mlp_ratio": 4.0,
        "theta": 10000, "out_channels": 16, "qkv_bias": True, "txt_ids_dims": [], "in_channels": 16,
        "hidden_size": 3072, "context_in_dim": 4096, "patch_size": 2, "vec_in_dim": 768,
        "depth": 19, "depth_single_blocks": 38, "guidance_embed": True,
    },
}  # fmt: skip
if "txt_ids_dims" not in FluxParams.__dataclass_fields__:  # an older ComfyUI
    del CONFIGS["flux"]["txt_ids_dims"]

_OF_FLUX_2 = (".to_qkv_mlp_proj.weight", ".attn.to_out.weight")


def text_encoder(kind):
    from comfy import sd1_clip, sdxl_clip
    from comfy.text_encoders import flux, sd3_clip

    options = {"device": "meta", "dtype": torch.float32}
    return {
        "sd1": lambda: sd1_clip.SD1ClipModel(**options),
        "sdxl": lambda: sdxl_clip.SDXLClipModel(**options),
        "sd3": lambda: sd3_clip.SD3ClipModel(**options),
        "flux": lambda: flux.FluxClipModel(**options),
    }[kind]()


class Listener(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def changes(kind, path, out, mode="changes"):
    config = comfy.model_detection.model_config_from_unet_config(CONFIGS[kind], {})
    config.set_inference_dtype(torch.float32, None)
    with torch.device("meta"):
        model = config.get_model({}, "", device="meta")
        clip = text_encoder(kind)
    listener = Listener()
    logging.getLogger().addHandler(listener)
    key_map = comfy.lora.model_lora_keys_unet(model, {})
    key_map = comfy.lora.model_lora_keys_clip(clip, key_map)
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(load_file(path)), key_map)
    information = {"unmatched": json.dumps(listener.lines), "patched": str(len(patches))}
    if mode == "keys":
        return save_file({"nothing": torch.zeros(1)}, out, information)
    shapes = {k: v.shape for m in (model, clip) for k, v in m.state_dict().items()}
    deltas = {}
    for target, patch in patches.items():
        key, offset, function = (target, None, None)
        if isinstance(target, tuple):
            key, offset = target[0], target[1]
            function = target[2] if len(target) > 2 else None
        shape = list(shapes[key])
        if offset is not None:
            shape[offset[0]] = offset[2]
        zero = torch.zeros(shape)
        delta = patch.calculate_weight(zero, key, 1.0, 1.0, None, function or (lambda a: a))
        whole = deltas.setdefault(key, torch.zeros(shapes[key]))
        part = whole if offset is None else whole.narrow(*offset)
        part += delta
    tables = {
        "sd1": comfy.utils.unet_to_diffusers, "sdxl": comfy.utils.unet_to_diffusers,
        "sd3": comfy.utils.mmdit_to_diffusers, "flux": comfy.utils.flux_to_diffusers,
    }  # fmt: skip
    component = "unet" if kind in ("sd1", "sdxl") else "transformer"
    found = {}
    for name, target in tables[kind](CONFIGS[kind]).items():
        # FLUX.2's names stand for FLUX.1's layers beside its own.
        if not name.endswith(".weight") or name.endswith(_OF_FLUX_2):
            continue
        target = target if isinstance(target, tuple) else (target,)
        key = "diffusion_model." + target[0]
        if key in deltas:
            delta = deltas[key]
            if len(target) > 1 and target[1] is not None:
                delta = delta.narrow(*target[1])
            if len(target) > 2:
                delta = target[2](delta)
            found[f"{component}.{name.removesuffix('.weight')}"] = delta
    encoders = {"clip_l": "text_encoder", "clip_g": "text_encoder_2",
                "t5xxl": "text_encoder_3" if kind == "sd3" else "text_encoder_2"}  # fmt: skip
    for key, delta in deltas.items():
        for own, name in encoders.items():
            if key.startswith(f"{own}.transformer."):
                path = key.removeprefix(f"{own}.transformer.").removesuffix(".weight")
                found[f"{name}.{path}"] = delta
    products = {}
    for name, delta in found.items():
        generator = torch.Generator().manual_seed(0)
        products[name] = delta.flatten(1) @ torch.randn(delta[0].numel(), 3, generator=generator)
    return save_file(products, out, information)


def outputs(checkpoint, path, out):
    listener = Listener()
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(checkpoint, output_vae=False)
    logging.getLogger().addHandler(listener)
    model, clip = comfy.sd.load_lora_for_models(model, clip, load_file(path), 1.0, 1.0)
    unmatched = list(listener.lines)
    with torch.no_grad():
        tokens = clip.tokenize("a photo of a dog")
        text = clip.encode_from_tokens(tokens)
        comfy.model_management.load_models_gpu([model])
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        noise = model.model.diffusion_model(latents, torch.tensor([500.0]), context=text.float())
    found = {"text": text.float().contiguous(), "noise": noise.float().contiguous()}
    save_file(found, out, {"unmatched": json.dumps(unmatched)})


if __name__ == "__main__":
    run = changes if sys.argv[2] in CONFIGS else outputs
    run(*sys.argv[2:])
