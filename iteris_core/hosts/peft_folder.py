"""Adapter folders of peft (``adapter_config.json`` and ``adapter_model.safetensors``)."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import IterisError, LoraFileError
from ..lora import Lora, LowRank
from ..lora_files import read_tensors
from ..lora_files.saving import umask

_PREFIX = "base_model.model."
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "layer_replication": "layer-replicating",
}
"""Settings of peft under which a change is not just up · down, and what they are called"""
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Values of peft's ``init_lora_weights`` that take something out of the base's weights"""


def read_adapter(folder: Path, sites: Mapping[str, nn.Module]) -> Lora:
    """A LoRA adapter as peft saves it; heads in ``modules_to_save`` stay out, named in metadata.

    Raises :class:`LoraFileError` for another kind of adapter, or one of another base model.
    """
    config, tensors = _read_folder(folder)
    _check_plain(folder, config)
    factors: dict[str, dict[str, Tensor]] = {}
    apart: list[str] = []
    for name, tensor in tensors.items():
        if _is_apart(name, config):
            apart.append(name)
            continue
        module, _, leaf = name.rpartition(".lora_")
        if leaf not in ("A.weight", "B.weight"):
            raise LoraFileError(
                f"{folder}: {name} {tuple(tensor.shape)} is no factor of a linear or convolution; "
                "embeddings and biases that were trained cannot be merged."
            )
        factors.setdefault(f"model.{module}", {})[leaf[0]] = tensor
    unknown = [site for site in factors if site not in sites]
    if unknown:
        first = ", ".join(f"{s} {tuple(factors[s]['A'].shape)}" for s in unknown[:3])
        raise LoraFileError(
            f"{folder}: {len(unknown)} of {len(factors)} sites match nothing in the base model; "
            f"the first are {first}. This adapter was made for another base model."
        )
    changes = {
        site: _low_rank(folder, site, parts, config, sites[site]) for site, parts in factors.items()
    }
    metadata = {"kept_apart": ", ".join(apart)} if apart else {}
    return Lora(changes, folder.name, metadata)


def _check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise :class:`LoraFileError` where more than the two factors makes the change."""
    kind = config.get("peft_type") or "nameless"
    if kind == "LORA":
        kind = next((title for name, title in _VARIANTS.items() if config.get(name)), None)
    if kind is not None:
        raise LoraFileError(f"{folder} is a {kind} adapter; only plain LoRA is merged here.")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        raise LoraFileError(
            f"{folder} started from {start!r}, which changes the base model's weights too; save it "
            "as a plain LoRA first (peft: save_pretrained with "
            "path_initial_model_for_weight_conversion)."
        )


def read_heads(folder: str | Path) -> dict[str, Tensor]:
    """The modules that an adapter was saved with in full (``modules_to_save``), such as a head.

    Name of the parameter in the base model → tensor; load it with ``strict=False``. A merge leaves
    them alone: every task keeps its own.
    """
    config, tensors = _read_folder(Path(folder))
    return {name: tensor for name, tensor in tensors.items() if _is_apart(name, config)}


def _is_apart(name: str, config: Mapping[str, Any]) -> bool:
    heads = config.get("modules_to_save") or []
    return any(f".{head}." in f".{name}." for head in heads)


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration, and the tensors by their names in the base model."""
    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_file.is_file() or not weights.is_file():
        raise LoraFileError(
            f"{folder} is no adapter folder of peft: it needs adapter_config.json and "
            "adapter_model.safetensors (a pickled adapter_model.bin is not read)."
        )
    try:
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoraFileError(f"{config_file} is not valid JSON ({error}).") from error
    tensors, _ = read_tensors(weights)
    return config, {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}


def _low_rank(
    folder: Path, site: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], module: Any
) -> LowRank:
    from peft.utils.other import get_pattern_key

    if set(parts) != {"A", "B"}:
        raise LoraFileError(f"{folder}: site {site} has only one of its two factors.")
    down, up, shape = parts["A"], parts["B"], _weight_shape(module)
    ones = (1,) * len(shape[2:])
    if not len(down) or down.shape[1:] != shape[1:] or up.shape != (shape[0], len(down), *ones):
        raise LoraFileError(
            f"{folder}: site {site} has A {tuple(down.shape)} and B {tuple(up.shape)}, but the "
            f"base model's weight there is {tuple(shape)}; it was made for another base model."
        )
    patterns = dict(config.get("alpha_pattern") or {})
    alpha = config.get("lora_alpha", 8)  # peft's own default
    if patterns:
        alpha = patterns.get(get_pattern_key(list(patterns), site.removeprefix("model.")), alpha)
    scale = alpha / (len(down) ** 0.5 if config.get("use_rslora") else len(down))
    kernel = (int(shape[2]), int(shape[3])) if len(shape) == 4 else None
    return LowRank(up.flatten(1).float() * scale, down.flatten(1).float(), kernel)


def _weight_shape(module: Any) -> tuple[int, ...]:
    """(out, in, …), also where the weight is stored transposed (Conv1D) or packed (quantised)."""
    if isinstance(module, nn.Conv2d):
        return tuple(module.weight.shape)
    if hasattr(module, "nf"):
        return module.nf, module.nx
    return module.out_features, module.in_features


def check_folder(folder: str | Path) -> Path:
    """Raise :class:`IterisError` if :func:`write_adapter` cannot write there."""
    folder = Path(folder)
    if folder.exists():
        raise IterisError(f"{folder} exists already; choose another name.")
    return folder


def write_adapter(
    lora: Lora,
    folder: str | Path,
    *,
    base: str = "",
    heads: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write an adapter folder that ``PeftModel.from_pretrained`` loads.

    ``base`` is the name of the base model. ``heads`` are one task's, as :func:`read_heads` gives
    them: they go into the folder as ``modules_to_save``. Raises :class:`IterisError` if the folder
    exists.
    """
    folder = check_folder(folder)
    ranks = {site.removeprefix("model."): c.rank for site, c in lora.sites.items()}
    largest = max(ranks.values())
    # peft's patterns fit ends of names unless they say otherwise.
    patterns = {f"^{name}": rank for name, rank in ranks.items() if rank != largest}
    config = {
        "peft_type": "LORA",
        # A folder of this machine says nothing elsewhere, and tells where somebody keeps things.
        "base_model_name_or_path": Path(base).name if Path(base).is_absolute() else base,
        "r": largest,
        "lora_alpha": largest,
        "target_modules": sorted(ranks),
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "inference_mode": True,
        "bias": "none",
        "modules_to_save": sorted({name.rpartition(".")[0] for name in heads or {}}) or None,
    }
    tensors = {_PREFIX + name: tensor.contiguous() for name, tensor in (heads or {}).items()}
    for site, change in lora.sites.items():
        name = _PREFIX + site.removeprefix("model.")
        up, down = change.up, change.down
        if change.kernel is not None:
            up, down = up[:, :, None, None], down.reshape(change.rank, -1, *change.kernel)
        tensors[f"{name}.lora_A.weight"] = down.to("cpu", dtype).contiguous()
        tensors[f"{name}.lora_B.weight"] = up.to("cpu", dtype).contiguous()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=1)
        (temporary / "adapter_config.json").write_text(text, encoding="utf-8")
        temporary.chmod(0o777 & ~umask())  # mkdtemp's is for the owner only
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder
