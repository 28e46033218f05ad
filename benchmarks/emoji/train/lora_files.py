"""LoRA files of the denoiser as diffusers saves them, and as kohya's sd-scripts does for FLUX.

kohya's file has FLUX's own names, where query, key and value (of a single block the MLP as well)
are one matrix: they share the down matrix. So do they here while such a LoRA trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from toybox.train.lora_files import adapter_metadata

TARGETS = (
    r"(single_)?transformer_blocks\.\d+\."
    r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)
"""Attention and MLP of every block, as people train FLUX."""

_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}


def kohya_names(transformer: FluxTransformer2DModel) -> Iterator[tuple[str, list[str]]]:
    """kohya's name of each matrix, and diffusers' modules that it is made of."""
    for kind, short, table in (
        ("transformer_blocks", "double_blocks", _DOUBLE),
        ("single_transformer_blocks", "single_blocks", _SINGLE),
    ):
        for index in range(len(getattr(transformer, kind))):
            for theirs, parts in table.items():
                modules = [f"{kind}.{index}.{part}" for part in parts]
                yield f"lora_unet_{short}_{index}_{theirs}", modules


def share_downs(transformer: FluxTransformer2DModel) -> None:
    """Let what is one matrix in kohya's file have one down matrix."""
    for _, modules in kohya_names(transformer):
        first: Any = transformer.get_submodule(modules[0])
        for module in modules[1:]:
            layer: Any = transformer.get_submodule(module)
            layer.lora_A = first.lora_A


def adapter_state(transformer: Any) -> dict[str, Tensor]:
    """The adapter's weights as float16, in peft's names."""
    state = get_peft_model_state_dict(transformer)
    return {name: value.detach().half().clone() for name, value in state.items()}


def save_diffusers(pipeline: Any, config: LoraConfig, path: Path) -> None:
    """As diffusers saves: peft's names, alpha in the file's metadata only."""
    pipeline.save_lora_weights(
        path.parent,
        transformer_lora_layers=adapter_state(pipeline.transformer),
        transformer_lora_adapter_metadata=adapter_metadata(config),
        weight_name=path.name,
    )


def save_kohya(transformer: FluxTransformer2DModel, entry: Mapping[str, Any], path: Path) -> None:
    """As kohya's sd-scripts saves: FLUX's names, alpha as a tensor."""
    state, tensors = adapter_state(transformer), {}
    for name, modules in kohya_names(transformer):
        tensors[f"{name}.lora_down.weight"] = state[f"{modules[0]}.lora_A.weight"]
        ups = [state[f"{module}.lora_B.weight"] for module in modules]
        tensors[f"{name}.lora_up.weight"] = torch.cat(ups).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(entry["alpha"]), dtype=torch.float16)
    metadata = {
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(entry["rank"]),
        "ss_network_alpha": str(float(entry["alpha"])),
        "ss_output_name": entry["token"],
        "ss_base_model_version": "flux1",
    }
    save_file(tensors, path, metadata=metadata)
