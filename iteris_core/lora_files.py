"""LoRA files: checked reading of tensors, and writing in kohya and PEFT layouts.

Only safetensors is read; pickled files are refused unopened. Which key means which site is the
host's knowledge (:meth:`.hosts.Host.read_lora`).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import IterisError, LoraFileError
from .lora import Lora, LowRank

Layout = Literal["kohya", "peft"]

DTYPES: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}

_KOHYA_PREFIXES = {
    "unet": "lora_unet",
    "transformer": "lora_unet",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, in their own dtypes, and the metadata of a safetensors file.

    Raises :class:`LoraFileError` for what is not a whole safetensors file, and for NaN or Inf.
    """
    if not path.is_file():
        raise LoraFileError(f"{path} does not exist or is not a file; check the path.")
    with path.open("rb") as file:
        head = file.read(16)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        raise LoraFileError(
            f"{path} is a pickled PyTorch file, which could run code when it is opened; "
            "convert it to safetensors where you trust its source."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise LoraFileError(
            f"{path} is not a whole safetensors file ({error}); download or save it again."
        ) from error
    if not tensors:
        raise LoraFileError(f"{path} holds no tensors; it is not a LoRA file.")
    for key, tensor in tensors.items():
        values = tensor.float() if tensor.element_size() == 1 else tensor
        if tensor.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise LoraFileError(
                f"{path}: tensor {key} holds NaN or infinite values; the file is broken or its "
                "training diverged."
            )
    return tensors, metadata


def write_lora(
    lora: Lora,
    path: str | Path,
    *,
    layout: Layout = "kohya",
    dtype: str = "float16",
    overwrite: bool = False,
) -> Path:
    """Write ``lora`` so that every tool reads it in full, and return the path.

    The scale is spelled out: every site has the same alpha, since loaders that keep one alpha per
    model lose per-site ones. The file appears under its name only when it is complete. Raises
    :class:`IterisError` if it exists (unless ``overwrite``) or a value does not fit ``dtype``.
    """
    path = Path(path)
    check_target(path, layout, dtype, overwrite)
    if not lora.sites:
        raise IterisError("The merged LoRA changes no site; there is nothing to write.")
    alpha = max(lora.ranks)
    tensors: dict[str, Tensor] = {}
    for site, change in lora.sites.items():
        _put(tensors, site, _stored(site, change, alpha, DTYPES[dtype]), alpha, layout)
    metadata = {**lora.metadata, "format": "pt"}
    if layout == "kohya":
        metadata.setdefault("ss_network_module", "networks.lora")
        metadata["ss_network_dim"] = metadata["ss_network_alpha"] = str(alpha)
    else:
        metadata["lora_adapter_metadata"] = json.dumps(_peft_metadata(lora, alpha))
    _save_atomically(tensors, path, metadata)
    return path


def check_target(path: Path, layout: str, dtype: str, overwrite: bool) -> None:
    """Raise :class:`IterisError` where :func:`write_lora` would, before any work is done."""
    if dtype not in DTYPES:
        raise IterisError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    if layout not in ("kohya", "peft"):
        raise IterisError(f'layout must be "kohya" or "peft", not {layout!r}.')
    if path.suffix != ".safetensors":
        raise IterisError(f"{path} must end in .safetensors.")
    if path.exists() and not overwrite:
        raise IterisError(f"{path} exists already; choose another name or allow overwriting.")
    if not path.parent.is_dir():
        raise IterisError(f"The folder {path.parent} does not exist; make it first.")


def _stored(site: str, change: LowRank, alpha: int, dtype: torch.dtype) -> LowRank:
    """Factors in ``dtype`` such that up @ down · alpha / rank is the change."""
    scaled = change.to(torch.float32, "cpu").scaled(change.rank / alpha)
    stored = scaled.to(dtype)
    for factor in (stored.up, stored.down):
        if not bool(torch.isfinite(factor).all()):
            raise IterisError(
                f"Site {site}: values do not fit {dtype}; write bfloat16 or float32 instead."
            )
    return stored


def _put(
    tensors: dict[str, Tensor], site: str, stored: LowRank, alpha: int, layout: Layout
) -> None:
    component, _, module = site.partition(".")
    up, down = stored.up, stored.down
    if stored.kernel is not None:
        up = up[:, :, None, None]
        down = down.reshape(stored.rank, -1, *stored.kernel)
    if layout == "kohya":
        if component not in _KOHYA_PREFIXES:
            raise IterisError(f'Site {site} has no name in kohya layout; write layout="peft".')
        name = f"{_KOHYA_PREFIXES[component]}_{module.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = down.contiguous()
        tensors[f"{name}.lora_up.weight"] = up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha), dtype=torch.float32)
    else:
        tensors[f"{site}.lora_A.weight"] = down.contiguous()
        tensors[f"{site}.lora_B.weight"] = up.contiguous()


def _peft_metadata(lora: Lora, alpha: int) -> dict[str, object]:
    """What diffusers writes as ``lora_adapter_metadata``: a LoraConfig per component."""
    config: dict[str, object] = {}
    for component in {site.partition(".")[0] for site in lora.sites}:
        modules = {
            site.partition(".")[2]: change.rank
            for site, change in lora.sites.items()
            if site.startswith(f"{component}.")
        }
        if component.startswith("text_encoder"):
            # transformers 5 took ``text_model.`` out of the module names that peft compares with.
            modules = {name.removeprefix("text_model."): rank for name, rank in modules.items()}
        config[f"{component}.r"] = alpha
        config[f"{component}.lora_alpha"] = alpha
        config[f"{component}.target_modules"] = sorted(modules)
        config[f"{component}.rank_pattern"] = {
            name: rank for name, rank in modules.items() if rank != alpha
        }
    return config


def _save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    handle, temporary = tempfile.mkstemp(suffix=".tmp", prefix=f".{path.stem}-", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
