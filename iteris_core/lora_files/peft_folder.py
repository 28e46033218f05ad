"""peft adapter folders (``adapter_config.json`` and ``adapter_model.safetensors``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures import Architecture
from ..architectures.record import BaseModel, Shapes, whole
from ..errors import LoraFileError
from ..lora import Lora
from ..saving import new_folder, together
from .factors import lora_config, stored_factors
from .metadata import public_name
from .read import ReadOptions, lora_of
from .tensors import read_tensors, save_tensors

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HARMLESS = frozenset({
    # What and where: the tensors repeat it, or the reader handles it.
    "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "init_lora_weights",  # checked separately
    # About training, or how the library runs it.
    "lora_dropout", "bias", "inference_mode", "fan_in_fan_out", "megatron_config", "megatron_core",
    "runtime_config", "loftq_config", "eva_config", "qalora_group_size", "ensure_weight_tying",
    # Notes.
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
})  # fmt: skip
"""Settings of peft's LoraConfig that keep a change equal to scale · up · down, whatever their
value. Any other setting makes the adapter a variant, including settings added to peft later."""
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Values of peft's ``init_lora_weights`` that modify the base's weights"""


def read_adapter(folder: Path, shapes: Shapes, layers: str = "") -> Lora:
    """Read the LoRA adapter that peft saved in ``folder``, for a model whose sites have weights of
    these ``shapes``.
    Heads in ``modules_to_save`` are left out and named in the metadata. ``layers`` are as in
    :func:`.blocks.filtered`.

    Raises :class:`LoraFileError` for another kind of adapter, or one for another base model.
    """
    config, factors, heads = _read_folder(folder)
    kind = config.get("peft_type") or "nameless"
    if kind != "LORA":
        raise LoraFileError(f"{folder} is a {kind} adapter; only plain LoRA can be merged.")
    unknown = {n: v for n, v in config.items() if n not in _HARMLESS | {"peft_type"} and v}
    if unknown:
        name, value = next(iter(unknown.items()))
        raise LoraFileError(
            f"{folder} is no plain LoRA: its adapter_config.json has {name} = "
            f"{str(value)[:60]}, under which a change may be more than up times down; only plain "
            "LoRA is merged here."
        )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        raise LoraFileError(
            f"{folder} started from {start!r}, which changes the base model's weights too; save it "
            "as a plain LoRA first (peft: save_pretrained with "
            "path_initial_model_for_weight_conversion)."
        )
    aliases = {site.removeprefix("model."): whole(site, shapes) for site in shapes}
    base = BaseModel(Architecture("transformers", "transformers"), shapes, aliases, {})
    lora = lora_of(folder / _WEIGHTS, factors, {"": config}, base, None, ReadOptions(layers=layers))
    metadata = {"kept_apart": ", ".join(heads)} if heads else {}
    return replace(lora, name=folder.name, source=folder.name, metadata=metadata)


def read_heads(folder: str | Path) -> dict[str, Tensor]:
    """The modules that the adapter in ``folder`` has in full (``modules_to_save``), such as a head.

    Parameter name in the base model → tensor; load it with ``strict=False``. A merge does not
    change them: every task keeps its own.
    """
    return _read_folder(Path(folder))[2]


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The configuration; and the tensors by parameter name in the base model, factors and heads."""
    config_file, weights = folder / _CONFIG, folder / _WEIGHTS
    if not config_file.is_file() or not weights.is_file():
        raise LoraFileError(
            f"{folder} is not a peft adapter folder: it needs adapter_config.json and "
            "adapter_model.safetensors (a pickled adapter_model.bin is not read)."
        )
    try:
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoraFileError(f"{config_file} is not valid JSON ({error}).") from error
    factors: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for key, tensor in read_tensors(weights)[0].items():
        name = key.removeprefix(_PREFIX)
        apart = any(f".{head}." in f".{name}." for head in config.get("modules_to_save") or [])
        (heads if apart else factors)[name] = tensor
    return config, factors, heads


def write_adapter(
    lora: Lora,
    folder: str | Path,
    *,
    base: str = "",
    heads: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write ``lora`` in ``dtype`` as an adapter folder that ``PeftModel.from_pretrained`` loads.

    ``base`` is the name of the base model. ``heads`` are one task's, from :func:`read_heads`; they
    are written as ``modules_to_save``. Raises :class:`IterisError` if the folder exists.
    """
    ranks = {site.removeprefix("model."): change.rank for site, change in lora.sites.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": public_name(base),
        # peft's patterns match the ends of names unless they say otherwise.
        **lora_config({name: (rank, rank) for name, rank in ranks.items()}, "^"),
        "inference_mode": True,
        "bias": "none",
        "modules_to_save": sorted({name.rpartition(".")[0] for name in heads or {}}) or None,
    }
    tensors = {_PREFIX + name: tensor.contiguous() for name, tensor in (heads or {}).items()}
    for site, change in lora.sites.items():
        name = _PREFIX + site.removeprefix("model.")
        up, down = stored_factors(replace(change, scale=1.0), dtype)
        tensors |= {f"{name}.lora_A.weight": down.cpu(), f"{name}.lora_B.weight": up.cpu()}
    folder = Path(folder)
    with new_folder(folder), together() as beside:
        save_tensors(tensors, beside(folder / _WEIGHTS), {"format": "pt"})
        text = json.dumps(config, indent=1)
        beside(folder / _CONFIG).write_text(text, encoding="utf-8")
    return folder
