"""What peft says elsewhere than ComfyUI looks for it: alphas in the metadata, and magnitudes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..iteris_core.lora_files.configs import adapter_configs, configured_scale

_DOWN = ".lora_A.weight"
_MAGNITUDES = (".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def as_comfyui_names_them(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Tensor]:
    """``tensors``, an ``alpha`` for every module that ``lora_adapter_metadata`` speaks of, and
    peft's magnitudes as ``dora_scale``; changes of biases that are all zeros are left out."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.endswith((".diff_b", ".lora_B.bias")) and not bool(tensor.float().any()):
            continue
        end = next((end for end in _MAGNITUDES if key.endswith(end)), None)
        if end is not None:
            key, tensor = f"{key.removesuffix(end)}.dora_scale", tensor.reshape(-1, 1)
        found[key] = tensor
    configs = adapter_configs(path, metadata)
    for key, down in tensors.items():
        name = key.removesuffix(_DOWN)
        component, _, module = name.partition(".")
        config = configs.get(component, configs.get(""))
        if key.endswith(_DOWN) and config is not None and f"{name}.alpha" not in found:
            # ComfyUI divides by the rank.
            rank = down.shape[0]
            scale = configured_scale(path, config, module if component in configs else name, rank)
            found[f"{name}.alpha"] = torch.tensor(scale * rank)
    return found
