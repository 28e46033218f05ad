"""LoRA files with names that only a pipeline's own loader knows, through its converter.

A diffusers converter may silently drop keys. Every row of every input tensor must therefore appear
unchanged in the output. Alphas are folded in first, because converters treat them differently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraFileError, brief
from ..lora_files import BaseModel
from ..lora_files.parts import modules_of, split_key

Tensors = Mapping[str, Tensor]

_PREFIXES = re.compile(r"^(base_model\.model\.)?(diffusion_model\.)?(transformer\.)?")


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
    tried: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []
    error: Exception | None = None
    for spelled in _spellings(_with_alphas_folded(tensors)):
        try:
            converted, lost = _convert(pipeline, spelled)
        except Exception as failure:  # converters raise many types of exception
            error = error or failure
            continue
        missing = len(lost) + len(_unknown(converted, base))
        if not missing:
            return converted
        tried.append((missing, converted, lost))
    if allow_partial:
        best = min(tried, key=lambda attempt: attempt[0], default=(0, dict(tensors), {}))
        return best[1] | {f"{key} (left out by diffusers' loader)": t for key, t in best[2].items()}
    name = type(pipeline).__name__
    text = [key for key in unknown if key.startswith(("text_encoder", "lora_te"))]
    if text:
        raise LoraFileError(
            f"{path}: {text[0]} changes a text encoder, which diffusers' loader of {name} ignores. "
            "Allow partial reading (option allow_partial) to merge without it."
        )
    lost = next((lost for _, _, lost in tried if lost), None)
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
    folded = dict(tensors)
    for keys in modules_of(tensors).values():
        if {"alpha", "down", "up"} <= keys.keys():
            alpha, rank = tensors[keys["alpha"]], tensors[keys["down"]].shape[0]
            scale = float(alpha.flatten()[0]) / max(rank, 1)
            folded[keys["up"]] = tensors[keys["up"]].float() * scale
            folded[keys["alpha"]] = torch.full_like(alpha, rank, dtype=torch.float32)
    return folded


def _spellings(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The same tensors: unchanged, without redundant alphas, and under the prefixes by which
    converters recognise ComfyUI's and kohya's files."""
    bare = {key: t for key, t in tensors.items() if not key.endswith(".alpha")}
    yield tensors
    yield bare
    ours: dict[str, Tensor] = {}
    kohya: dict[str, Tensor] = {}
    for key, tensor in bare.items():
        name = _PREFIXES.sub("", key)
        module, part = split_key(name, ()) or (name, "")
        leaf = {"down": ".lora_down.weight", "up": ".lora_up.weight"}.get(part, f".{part}")
        ours[f"diffusion_model.{name}"] = tensor
        kohya[f"lora_unet_{module.replace('.', '_')}{leaf}"] = tensor
    yield ours
    yield kohya


def _convert(
    pipeline: Any, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The loader's result for ``tensors``, including alphas that it returns separately; and the
    tensors that it lost, at least in part."""
    unet = getattr(pipeline, "unet", None)
    options = {} if unet is None else {"unet_config": unet.config}
    loaded: Any = type(pipeline).lora_state_dict(dict(tensors), **options)  # which it may empty
    state, alphas = loaded if isinstance(loaded, tuple) else (loaded, None)
    converted: dict[str, Tensor] = {
        **state,
        **{key: torch.tensor(float(alpha)) for key, alpha in (alphas or {}).items()},
    }
    none = torch.empty(0, dtype=torch.int64)
    there = torch.cat([none, *map(fingerprints, converted.values())])
    lost = {k: t for k, t in tensors.items() if not torch.isin(fingerprints(t), there).all()}
    return converted, {k: t for k, t in lost.items() if not k.endswith(".alpha")}


def fingerprints(tensor: Tensor) -> Tensor:
    """(rows,) int64, equal for equal rows. Zero rows carry no information, may be dropped, and get
    no fingerprint."""
    rows = tensor.float().flatten(1) if tensor.ndim > 1 else tensor.float().reshape(-1, 1)
    generator = torch.Generator().manual_seed(rows.shape[1])
    factors = torch.randint(2**62, rows.shape[1:], generator=generator)
    sums = (rows.contiguous().view(torch.int32) * factors).sum(dim=1)  # modulo 2^64
    return sums[(rows != 0).any(dim=1)]
