"""Embeddings that come with a LoRA: bundled (``bundle_emb.NAME.…``) or beside it.

Beside ``<stem>.safetensors`` it is called ``<stem>_emb.safetensors`` (pivotal tuning) or
``<stem>_embedding.safetensors`` (textual inversion). A merged LoRA lists its embeddings, and
:func:`embedding_files` says where each is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path

from torch import Tensor

from ..errors import LoraFileError
from .metadata import parse_object
from .tensors import read_tensors

Embeddings = dict[str, dict[str, Tensor]]
"""Name → text encoder (``clip_l``, ``clip_g``, ``t5xxl``, …, or :data:`ANY`) → (vectors, width)"""

ANY = "emb_params"
"""The part of an embedding for an unspecified text encoder."""

_MARK, _A1111 = "bundle_emb.", "string_to_param.*"
_ALIASES = {_A1111: ANY, "text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
_ENCODERS = (ANY, "clip_", "t5", "umt5", "mt5", "byt5", "pile_t5", "qwen", "gemma", "llama")


def split_embeddings(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[Embeddings, dict[str, Tensor], list[str]]:
    """A file's embeddings, bundled and beside it; its other tensors; notes on what is missing."""
    embeddings, rest = unbundled(path, tensors)
    names = parse_object(metadata.get("iteris")).get("embeddings")
    if isinstance(names, list):  # a merged file
        files = embedding_files(path, [str(name) for name in names])
        for name, file in files.items():
            if name not in embeddings and file.is_file():
                embeddings |= _embeddings_of(file, name)
        missing = [
            f"its embedding {name} IS MISSING: it was written with this file as {file.name}; copy "
            "that beside it, otherwise its trigger words have no effect"
            for name, file in files.items()
            if name not in embeddings
        ]
        return {name: embeddings[name] for name in files if name in embeddings}, rest, missing
    for file in sidecar_files(path):
        beside = _embeddings_of(file, path.stem)
        if both := beside.keys() & embeddings.keys():
            raise LoraFileError(f"{path} and {file} both contain an embedding {min(both)!r}.")
        embeddings |= beside
    return embeddings, rest, []


def sidecar_files(path: Path) -> list[Path]:
    """The files beside the LoRA file ``path`` that hold embeddings of a trainer."""
    files = (path.with_name(f"{path.stem}_{end}.safetensors") for end in ("emb", "embedding"))
    return [file for file in files if file.is_file()]


def unbundled(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Embeddings, dict[str, Tensor]]:
    """The embeddings among the tensors of the LoRA file ``path``, and the other tensors."""
    embeddings: Embeddings = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_MARK):
            rest[key] = tensor
            continue
        name = key.removeprefix(_MARK).removesuffix(f".{_A1111}")  # a name may contain dots
        part = ANY
        if not key.endswith(_A1111):
            name, _, part = name.rpartition(".")
        embeddings.setdefault(name, {})[_ALIASES.get(part, part)] = _vectors(path, tensors, key)
    return embeddings, rest


def without_embeddings(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a merged file without its embeddings, for one of a merge's two files."""
    recipe = parse_object(metadata.get("iteris"))
    if "embeddings" not in recipe:
        return dict(metadata)
    return {**metadata, "iteris": json.dumps({**recipe, "embeddings": []})}


def bundled(embeddings: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of embeddings as bundled in a LoRA file."""
    return {
        f"{_MARK}{name}.{_A1111 if part == ANY else part}": vectors.contiguous()
        for name, parts in embeddings.items()
        for part, vectors in parts.items()
    }


def to_file(name: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An embedding's own file; diffusers uses a single tensor's key as the token, others do not."""
    tensors = {part: vectors.clone() for part, vectors in parts.items()}
    return {name: tensors[ANY]} if list(tensors) == [ANY] else tensors


def embedding_files(path: Path, names: Sequence[str]) -> dict[str, Path]:
    """Files for embeddings beside a LoRA; bundled, diffusers could not load it."""
    return {
        name: path.with_name(f"{path.stem}{f'_{stem}' * (len(names) > 1)}_emb.safetensors")
        for name, stem in file_names(names).items()
    }


def file_names(names: Iterable[str]) -> dict[str, str]:
    """A distinct file name for each embedding; "<cat>" and "cat" would collide."""
    files: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^\w.-]+", "_", name)[:80].strip("._") or "embedding"
        numbered = (f"{stem}-{number}" for number in count(2))
        files[name] = next(of for of in chain([stem], numbered) if of not in files.values())
    return files


def _embeddings_of(file: Path, stem: str) -> Embeddings:
    """A file beside a LoRA: the parts of one embedding, or diffusers' vectors by token."""
    tensors, metadata = read_tensors(file)
    parts = {_ALIASES.get(key, key): _vectors(file, tensors, key) for key in tensors}
    name = metadata.get("name", "")
    if any(part.startswith(_ENCODERS) for part in parts) and name not in parts:
        return {name or stem: parts}
    if name and len(parts) == 1:
        return {name: {ANY: next(iter(parts.values()))}}
    return {token: {ANY: vectors} for token, vectors in parts.items()}


def _vectors(path: Path, tensors: Mapping[str, Tensor], key: str) -> Tensor:
    tensor = tensors[key]
    if tensor.ndim not in (1, 2) or not tensor.numel() or not tensor.is_floating_point():
        raise LoraFileError(
            f"{path}: key {key} {tuple(tensor.shape)} is not an embedding, which has one vector "
            "per row; bundled in a LoRA its key is bundle_emb.NAME.PART."
        )
    return tensor.reshape(-1, tensor.shape[-1])
