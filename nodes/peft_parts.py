"""What peft says elsewhere than ComfyUI looks for it: alphas in the metadata, and magnitudes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..iteris_core.errors import LoraFileError

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
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return found
    try:
        flat = json.loads(text)
        configs: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            component, _, name = key.partition(".")
            configs.setdefault(component, {})[name] = value
    except (ValueError, AttributeError) as error:
        raise LoraFileError(
            f"{path}: lora_adapter_metadata is not valid JSON ({error})."
        ) from error
    for key, down in tensors.items():
        name = key.removesuffix(_DOWN)
        component, _, module = name.partition(".")
        config = configs.get(component, {})
        if key.endswith(_DOWN) and "lora_alpha" in config and f"{name}.alpha" not in found:
            found[f"{name}.alpha"] = torch.tensor(_alpha(config, module, down.shape[0]))
    return found


def _alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
    """peft's rule: the first pattern that matches the end of the module's name, else the common
    alpha; rsLoRA divides by √rank instead of rank."""
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    return alpha * rank**0.5 if config.get("use_rslora") else alpha
