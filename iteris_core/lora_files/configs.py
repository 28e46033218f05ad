"""Alpha where diffusers and peft keep it: the LoraConfigs in ``lora_adapter_metadata``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LoraFileError

_PLAIN = re.compile(r"[\w.\\^$*+?|\[\]-]{1,300}")


def adapter_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The LoraConfig of each component, as diffusers' pipelines save it: ``{"unet.lora_alpha": 8,
    …}``; that of a model which saves itself (``{"lora_alpha": 8, …}``) is of the component ``""``.
    """
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    try:
        flat = json.loads(text)
        configs: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            component, _, name = key.rpartition(".")
            configs.setdefault(component, {})[name] = value
        return {c: config for c, config in configs.items() if "lora_alpha" in config}
    except (ValueError, AttributeError, RecursionError) as error:
        raise LoraFileError(
            f"{path}: lora_adapter_metadata is not valid JSON ({error})."
        ) from error


def configured_scale(path: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / √rank for rsLoRA; the first pattern that fits decides alpha.

    A pattern is a regular expression for the end of a module's name, as in peft
    (``peft.utils.other.get_pattern_key``). Names of a text encoder may have ``text_model.`` in
    front of them or not, as the writer's transformers had it.
    """
    names = {module, module.removeprefix("text_model."), f"text_model.{module}"}
    alpha = config["lora_alpha"]
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise LoraFileError(f"{path}: alpha_pattern in lora_adapter_metadata is not a table.")
    for pattern, value in patterns.items():
        if any(_fits(path, pattern, name) for name in names):
            alpha = value
            break
    try:
        number = float(alpha)
    except (TypeError, ValueError, OverflowError) as error:
        raise LoraFileError(
            f"{path}: lora_alpha in lora_adapter_metadata is {str(alpha)[:40]!r}, not a number."
        ) from error
    if not math.isfinite(number):
        raise LoraFileError(f"{path}: lora_alpha in lora_adapter_metadata is {number}.")
    return number / (rank**0.5 if config.get("use_rslora") else rank)


def _fits(path: Path, pattern: str, module: str) -> bool:
    if module == pattern or module.endswith(f".{pattern}"):
        return True
    # Groups could nest repetitions and take for ever; no trainer writes them.
    if not _PLAIN.fullmatch(pattern) or sum(pattern.count(c) for c in "*+?") > 3:
        raise LoraFileError(
            f"{path}: alpha_pattern {pattern[:80]!r} in lora_adapter_metadata is too complicated; "
            "save the adapter with plain module names there."
        )
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error as error:
        raise LoraFileError(
            f"{path}: alpha_pattern {pattern[:80]!r} in lora_adapter_metadata: {error}."
        ) from error
