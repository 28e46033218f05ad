"""Embeddings that come with a LoRA: bundled (``bundle_emb.NAME.…``) or beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import IterisError, LoraFileError
from .tensors import read_tensors

_MARK = "bundle_emb."
_ENDS = ("emb", "embedding")

Embeddings = dict[str, dict[str, Tensor]]
"""name → text encoder (``clip_l``, ``clip_g``, …) → (vectors, width)"""


def split_embeddings(
    path: Path, tensors: Mapping[str, Tensor]
) -> tuple[Embeddings, dict[str, Tensor]]:
    """The embeddings of a LoRA file, also those in ``<name>_emb.safetensors`` or
    ``<name>_embedding.safetensors`` beside it, and the other tensors."""
    found: Embeddings = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_MARK):
            rest[key] = tensor
            continue
        name, _, part = key.removeprefix(_MARK).partition(".")
        if not name or not part or tensor.ndim not in (1, 2) or not tensor.is_floating_point():
            raise LoraFileError(
                f"{path}: key {key} {tuple(tensor.shape)} is no embedding; it should be "
                "bundle_emb.NAME.PART with one vector a row."
            )
        part = part.removeprefix("string_to_param.").removeprefix("string_to_params.")
        found.setdefault(name, {})["emb_params" if part == "*" else part] = tensor
    for beside in (path.with_name(f"{path.stem}_{end}.safetensors") for end in _ENDS):
        if not beside.is_file():
            continue
        parts, _ = read_tensors(beside)
        if path.stem in found:
            raise LoraFileError(f"{path} and {beside} both hold an embedding {path.stem!r}.")
        found[path.stem] = parts
    return found, rest


def embedding_targets(path: Path, names: list[str], overwrite: bool) -> dict[str, Path]:
    """Where the embeddings of the LoRA ``path`` go: beside it, ``<stem>_emb.safetensors`` for one,
    ``<stem>_<name>_emb.safetensors`` for each of several. Bundled in the file they would keep
    diffusers from loading it. Raises :class:`IterisError` where that exists."""
    targets: dict[str, Path] = {}
    for name in names:
        safe = re.sub(r"[^A-Za-z0-9-]+", "_", name)[:80]
        middle = "" if len(names) == 1 else f"_{safe}"
        target = path.with_name(f"{path.stem}{middle}_emb.safetensors")
        if target in targets.values():
            raise IterisError(f"Embeddings {names} would be written to one file, {target}.")
        if target.exists() and not overwrite:
            raise IterisError(f"{target} exists already; choose another name or allow overwriting.")
        targets[name] = target
    return targets
