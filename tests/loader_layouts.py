"""LoRA files of reduced pipelines in other tools' layouts, and what the loader makes of them."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def loaded_changes(pipeline, tensors: Tensors | str) -> Tensors:
    """ΔW of every site as peft has it after ``load_lora_weights``."""
    pipeline.load_lora_weights(dict(tensors) if isinstance(tensors, dict) else tensors)
    changes: Tensors = {}
    for component, model in pipeline.components.items():
        for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
            for adapter in getattr(module, "lora_A", {}):
                if name.startswith("encoder.layers."):
                    name = f"text_model.{name}"  # as files have it
                changes[f"{component}.{name}"] = module.get_delta_weight(adapter).detach()
    pipeline.unload_lora_weights()
    return changes


def renamed(tensors: Tensors, *pairs: tuple[str, str], prefix: str = "diffusion_model.") -> Tensors:
    """Peft's names under those of the original code, by regular expressions."""
    found: Tensors = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("transformer.")
        for pattern, other in pairs:
            name = re.sub(pattern, other, name)
        found[prefix + name] = tensor
    return found


def kohya(tensors: Tensors, alpha: float | None = 1.0) -> Tensors:
    """kohya's layout of ``diffusion_model.…`` or ``transformer.…`` names."""
    found: Tensors = {}
    for key, tensor in tensors.items():
        name, _, leaf = key.partition(".lora_")
        name = re.sub(r"^(diffusion_model|transformer)\.", "", name).replace(".", "_")
        down = leaf.startswith("A")
        found[f"lora_unet_{name}.lora_{'down' if down else 'up'}.weight"] = tensor
        if down and alpha is not None:
            found[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    return found


def fused(tensors: Tensors, parts: tuple[str, ...], whole: str) -> Tensors:
    """``parts``, ends of module names, as one module ``whole`` with the first one's down matrix."""
    found: Tensors = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.partition(".lora_")
        end = next((part for part in parts if module.endswith(part)), None)
        if end is None:
            found[key] = tensor
        elif end == parts[0]:
            names = [module.removesuffix(end) + part for part in parts]
            ups = [tensors[f"{name}.lora_{leaf}"] for name in names]
            joined = tensor if leaf.startswith("A") else torch.cat(ups)
            found[f"{module.removesuffix(end)}{whole}.lora_{leaf}"] = joined
    return found


WAN = (
    (r"attn1\.to_out\.0", "self_attn.o"), (r"attn2\.to_out\.0", "cross_attn.o"),
    (r"attn1\.to_", "self_attn."), (r"attn2\.to_", "cross_attn."),
    (r"attn2\.add_([kv])_proj", r"cross_attn.\1_img"),
    (r"ffn\.net\.0\.proj", "ffn.0"), (r"ffn\.net\.2", "ffn.2"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
)  # fmt: skip
FLUX2 = (
    (r"single_transformer_blocks", "single_blocks"), (r"transformer_blocks", "double_blocks"),
    (r"attn\.to_qkv_mlp_proj", "linear1"), (r"(single_blocks\.\d+)\.attn\.to_out", r"\1.linear2"),
    (r"attn\.qkv", "img_attn.qkv"), (r"attn\.add_qkv", "txt_attn.qkv"),
    (r"attn\.to_out\.0", "img_attn.proj"), (r"attn\.to_add_out", "txt_attn.proj"),
    (r"ff\.linear_in", "img_mlp.0"), (r"ff\.linear_out", "img_mlp.2"),
    (r"ff_context\.linear_in", "txt_mlp.0"), (r"ff_context\.linear_out", "txt_mlp.2"),
)  # fmt: skip
CHROMA = (
    (r"^transformer_blocks", "double_blocks"), (r"attn\.qkv", "img_attn_qkv"),
    (r"attn\.add_qkv", "txt_attn_qkv"), (r"attn\.to_out\.0", "img_attn_proj"),
    (r"attn\.to_add_out", "txt_attn_proj"), (r"ff_context\.net", "txt_mlp"),
    (r"ff\.net", "img_mlp"), (r"mlp\.0\.proj", "mlp.0"),
)  # fmt: skip
HUNYUAN = (
    (r"^transformer_blocks", "double_blocks"), (r"attn\.qkv", "img_attn_qkv"),
    (r"attn\.add_qkv", "txt_attn_qkv"), (r"attn\.to_out\.0", "img_attn_proj"),
    (r"attn\.to_add_out", "txt_attn_proj"), (r"ff_context", "txt_mlp"), (r"\.ff\.", ".img_mlp."),
    (r"net\.0\.proj", "fc1"), (r"net\.2", "fc2"),
)  # fmt: skip
Z_IMAGE = ((r"attention\.to_out\.0", "attention.out"),)
QKV = (("attn.to_q", "attn.to_k", "attn.to_v"), "attn.qkv")
ADDED = (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.add_qkv")
ATTENTION = (("attention.to_q", "attention.to_k", "attention.to_v"), "attention.qkv")


def _only(tensors: Tensors, pattern: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if re.search(pattern, key)}


def _hunyuan(tensors: Tensors) -> Tensors:
    blocks = _only(tensors, r"^transformer\.transformer_blocks")
    return renamed(fused(fused(blocks, *QKV), *ADDED), *HUNYUAN, prefix="")


def _chroma(tensors: Tensors) -> Tensors:
    blocks = _only(tensors, r"^transformer\.transformer_blocks")
    names = renamed(fused(fused(blocks, *QKV), *ADDED), *CHROMA)
    return kohya(names)


def _flux2(tensors: Tensors) -> Tensors:
    return renamed(fused(fused(tensors, *QKV), *ADDED), *FLUX2)


def _with_alphas(tensors: Tensors, alpha: float = 1.0) -> Tensors:
    modules = {key.partition(".lora_")[0] for key in tensors}
    return tensors | {f"{module}.alpha": torch.tensor(alpha) for module in modules}


LAYOUTS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "Wan, ComfyUI": ("Wan", lambda t: renamed(t, *WAN)),
    "Wan, ComfyUI with alphas": ("Wan", lambda t: _with_alphas(renamed(t, *WAN))),
    "Wan, musubi": ("Wan", lambda t: kohya(renamed(t, *WAN))),
    "Wan from a picture, ComfyUI": ("Wan from a picture", lambda t: renamed(t, *WAN)),
    "Qwen-Image, kohya": ("Qwen-Image", kohya),
    "Qwen-Image, ComfyUI": ("Qwen-Image", lambda t: renamed(t)),
    "Z-Image, kohya fused": (
        "Z-Image", lambda t: kohya(renamed(fused(t, *ATTENTION), *Z_IMAGE)),
    ),
    "Z-Image, kohya": ("Z-Image", kohya),
    "HiDream, ComfyUI": ("HiDream", lambda t: renamed(t)),
    "FLUX.2, ComfyUI": ("FLUX.2", _flux2),
    "FLUX.2, kohya": ("FLUX.2", lambda t: kohya(_flux2(t))),
    "LTX-Video, ComfyUI": ("LTX-Video", lambda t: renamed(t)),
    "HunyuanVideo, original": ("HunyuanVideo", _hunyuan),
    "Chroma, kohya": ("Chroma", _chroma),
}  # fmt: skip
"""Name → pipeline, and a peft file's tensors under other names; alphas are half the rank."""
