"""LoRA files with names that only a pipeline's own loader knows, through its converter.

A diffusers converter may silently drop keys. Every row of every input tensor must therefore appear
unchanged in the output. Alphas are folded in first, because converters treat them differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraFileError, brief
from ..lora_files import BaseModel
from ..lora_files.parts import split_key

Tensors = Mapping[str, Tensor]

_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")


@dataclass(frozen=True)
class _Converted:
    """A converter's output, and the ``lost`` tensors, which it dropped at least in part."""

    tensors: dict[str, Tensor]
    lost: dict[str, Tensor]


def by_loader(
    pipeline: Any, path: Path, base: BaseModel, tensors: Tensors, *, allow_partial: bool
) -> dict[str, Tensor]:
    """``tensors`` of the file ``path``, renamed to names that ``base`` has.

    If it has all of them, they stay. Otherwise the pipeline's loader converts them, if necessary
    under another spelling of the same names. Raises :class:`LoraFileError` that names the lost
    keys; with ``allow_partial`` they stay, under names that say so.
    """
    unknown = _unknown(tensors, base)
    if not unknown:
        return dict(tensors)
    tried: list[_Converted] = []
    error: Exception | None = None
    for spelled in _spellings(_with_alphas_folded(tensors)):
        try:
            converted = _convert(pipeline, spelled)
        except Exception as failure:  # converters raise many types of exception
            error = error or failure
            continue
        if not converted.lost and not _unknown(converted.tensors, base):
            return converted.tensors
        tried.append(converted)
    if allow_partial:
        best = min(tried, key=lambda c: len(c.lost) + len(_unknown(c.tensors, base)), default=None)
        if best is None:
            return dict(tensors)
        left_out = {f"{key} (left out by diffusers' loader)": t for key, t in best.lost.items()}
        return best.tensors | left_out
    name = type(pipeline).__name__
    text = [key for key in unknown if key.startswith(("text_encoder", "lora_te"))]
    if text:
        raise LoraFileError(
            f"{path}: {text[0]} changes a text encoder, which diffusers' loader of {name} ignores. "
            "Allow partial reading (option allow_partial) to merge without it."
        )
    lost = next((converted.lost for converted in tried if converted.lost), None)
    if lost and len(lost) < len(tensors):
        raise LoraFileError(
            f"{path}: diffusers' loader of {name} would leave out {len(lost)} of {len(tensors)} "
            f"tensors, such as {', '.join([*lost][:3])}. Allow partial reading (option "
            "allow_partial) to go on without them."
        )
    key, why = unknown[0], f" ({brief(error)})" if error is not None else ""
    raise LoraFileError(
        f"{path}: {key} {tuple(tensors[key].shape)} matches no module of the base model, and "
        f"diffusers' loader of {name} does not convert the file{why}; was this LoRA made for "
        "another base model?"
    )


def _unknown(tensors: Tensors, base: BaseModel) -> list[str]:
    splits = {key: split_key(key, base.aliases) for key in tensors}
    return [key for key, split in splits.items() if not split or split[0] not in base.aliases]


def _with_alphas_folded(tensors: Tensors) -> dict[str, Tensor]:
    """The same changes with every alpha equal to its rank."""
    parts: dict[str, dict[str, str]] = {}
    for key in tensors:
        module, part = split_key(key, ()) or (key, "")
        parts.setdefault(module, {})[part] = key
    folded = dict(tensors)
    for keys in parts.values():
        if {"alpha", "down", "up"} <= keys.keys():
            alpha, rank = tensors[keys["alpha"]], tensors[keys["down"]].shape[0]
            scale = float(alpha.flatten()[0]) / max(rank, 1)
            folded[keys["up"]] = tensors[keys["up"]].float() * scale
            folded[keys["alpha"]] = torch.full_like(alpha, rank, dtype=torch.float32)
    return folded


def _spellings(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The same tensors: unchanged, without redundant alphas, and under the prefixes by which
    converters recognise ComfyUI's and kohya's files."""
    bare = {k: t for k, t in tensors.items() if _part(k) != "alpha"}
    yield tensors
    yield bare
    ours: dict[str, Tensor] = {}
    for key, tensor in bare.items():
        name = key
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        ours[name] = tensor
    yield {f"diffusion_model.{name}": tensor for name, tensor in ours.items()}
    kohya: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        module, part = split_key(name, ()) or (name, "")
        leaf = {"down": ".lora_down.weight", "up": ".lora_up.weight"}.get(part, f".{part}")
        kohya[f"lora_unet_{module.replace('.', '_')}{leaf}"] = tensor
    yield kohya


def _convert(pipeline: Any, tensors: dict[str, Tensor]) -> _Converted:
    converted = _loaded(pipeline, dict(tensors))
    none = torch.empty(0, dtype=torch.int64)
    there = torch.cat([none, *map(fingerprints, converted.values())])
    factors = {key: tensor for key, tensor in tensors.items() if _part(key) != "alpha"}
    lost = {k: t for k, t in factors.items() if not torch.isin(fingerprints(t), there).all()}
    return _Converted(converted, lost)


def fingerprints(tensor: Tensor) -> Tensor:
    """(rows,) int64, equal for equal rows. Zero rows carry no information, may be dropped, and get
    no fingerprint."""
    rows = tensor.float().flatten(1) if tensor.ndim > 1 else tensor.float().reshape(-1, 1)
    generator = torch.Generator().manual_seed(rows.shape[1])
    factors = torch.randint(2**62, rows.shape[1:], generator=generator)
    sums = (rows.contiguous().view(torch.int32) * factors).sum(dim=1)  # modulo 2^64
    return sums[(rows != 0).any(dim=1)]


def _loaded(pipeline: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loader's result for ``tensors``, including alphas that it returns separately; the loader
    may empty ``tensors``."""
    unet = getattr(pipeline, "unet", None)
    options = {} if unet is None else {"unet_config": unet.config}
    loaded: Any = type(pipeline).lora_state_dict(tensors, **options)
    state, alphas = loaded if isinstance(loaded, tuple) else (loaded, None)
    return state | {key: torch.tensor(float(alpha)) for key, alpha in (alphas or {}).items()}


def _part(key: str) -> str:
    return (split_key(key, ()) or (key, ""))[1]
