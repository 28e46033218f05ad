"""Alpha as stored by peft: a LoraConfig, in ``lora_adapter_metadata`` or an adapter's folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import LoraFileError

_PLAIN = re.compile(r"[\w.\\^$*+?|\[\]-]{1,300}")


def adapter_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The LoraConfig of each component, as diffusers' pipelines save it: ``{"unet.lora_alpha": 8,
    …}``; for a model saved by itself (``{"lora_alpha": 8, …}``) the component is ``""``.
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


def scale_of(
    path: Path, configs: Mapping[str, Mapping[str, Any]], site: str, name: str, rank: int
) -> float | None:
    """The scale in ``configs``, by component, of the module called ``site`` here and ``name`` in
    the file; None if its component has no config."""
    parts = [full.partition(".") for full in (site, name)]
    for component, _, module in (*parts, ("", "", parts[0][2])):
        if component in configs:
            return configured_scale(path, configs[component], [module, name], rank)
    return None


def configured_scale(
    path: Path, config: Mapping[str, Any], names: Collection[str], rank: int
) -> float:
    """alpha / rank, or alpha / √rank for rsLoRA; the first matching pattern decides alpha.

    A pattern is a regular expression for the end of a module's name, as in peft
    (``peft.utils.other.get_pattern_key``; not called, because ComfyUI has no peft and a hostile
    pattern could make it hang). ``names`` are those of one module; in a text encoder they may start
    with ``text_model.``, depending on the writer's transformers version. Raises
    :class:`LoraFileError` for anything that peft cannot have written.
    """
    short = [name.removeprefix("text_model.") for name in names]
    names = {*names, *short, *(f"text_model.{name}" for name in short)}
    alpha = config.get("lora_alpha", 8)  # peft's own default
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise LoraFileError(f"{path}: alpha_pattern of the LoraConfig is not a table.")
    for pattern, value in patterns.items():
        if any(_fits(path, pattern, name) for name in names):
            alpha = value
            break
    try:
        number = float(alpha)
    except (TypeError, ValueError, OverflowError) as error:
        raise LoraFileError(
            f"{path}: lora_alpha of the LoraConfig is {str(alpha)[:40]!r}, not a number."
        ) from error
    if not math.isfinite(number):
        raise LoraFileError(f"{path}: lora_alpha of the LoraConfig is {number}.")
    return number / (rank**0.5 if config.get("use_rslora") else rank)


def _fits(path: Path, pattern: str, module: str) -> bool:
    if module == pattern or module.endswith(f".{pattern}"):
        return True
    # Groups could nest repetitions and never finish; no trainer writes them.
    if not _PLAIN.fullmatch(pattern) or sum(pattern.count(c) for c in "*+?") > 3:
        raise LoraFileError(
            f"{path}: alpha_pattern {pattern[:80]!r} of the LoraConfig is too complicated; save "
            "the adapter with plain module names instead."
        )
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error as error:
        raise LoraFileError(
            f"{path}: alpha_pattern {pattern[:80]!r} of the LoraConfig: {error}."
        ) from error


def lora_config(modules: Mapping[str, tuple[int, float]], mark: str) -> dict[str, Any]:
    """The fields of a LoraConfig for ``modules``, name → (rank, alpha); ``mark`` is prefixed to
    names in patterns."""
    ranks = [rank for rank, _ in modules.values()]
    common = max(set(ranks), key=ranks.count)
    return {
        "r": common,
        "lora_alpha": common,
        "target_modules": sorted(modules),
        "rank_pattern": {mark + n: rank for n, (rank, _) in modules.items() if rank != common},
        "alpha_pattern": {mark + n: alpha for n, (_, alpha) in modules.items() if alpha != common},
    }
