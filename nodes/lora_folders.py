"""ComfyUI's folders for LoRAs, by names that reveal nothing about this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

import folder_paths
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..iteris_core.errors import IterisError
from ..iteris_core.lora_files.embeddings import file_names, to_file, unbundled
from ..iteris_core.lora_files.tensors import save_atomically

_END = ".safetensors"
_DEFAULT = "default"


def folder_names() -> list[str]:
    """``default``, and the last two path parts of each other folder, numbered if ambiguous."""
    names = [_DEFAULT]
    for folder in folder_paths.get_folder_paths("loras")[1:]:
        name = "/".join(Path(folder).parts[-2:])
        names.append(name if name not in names else f"{name} ({len(names)})")
    return names


def new_file(prefix: str, folder: str = _DEFAULT, *, overwrite: bool = False) -> tuple[Path, str]:
    """A new file name, or an existing one if it may be overwritten, and its folder below the one
    for LoRAs; ``prefix`` supports Save Image's placeholders, such as %year%."""
    prefix = prefix.strip().removesuffix(_END)
    names = folder_names()
    if folder not in names:
        raise IterisError(f"There is no folder {folder} for LoRAs; choose from {', '.join(names)}.")
    at = names.index(folder)
    root = os.path.abspath(folder_paths.get_folder_paths("loras")[at])
    target = os.path.normpath(os.path.join(root, prefix))
    if not prefix or prefix.endswith(("/", os.sep)) or target == root:
        raise IterisError("Save Merged LoRA has no name; enter one as filename_prefix.")
    if not target.startswith(root + os.sep):
        raise IterisError(f"{prefix} is outside the folder for LoRAs; use a name or folder/name.")
    where, name, _, subfolder, _ = folder_paths.get_save_image_path(prefix, root)
    candidates = numbered_files(Path(where), name)
    file = next(path for path in candidates if overwrite or not path.exists())
    return file, subfolder


def numbered_files(folder: Path, name: str) -> Iterator[Path]:
    """NAME.safetensors, NAME_2.safetensors, …"""
    return (folder / f"{name}{f'_{n}' if n > 1 else ''}{_END}" for n in count(1))


def how_to_call(lora: Mapping[str, Tensor]) -> str:
    """Lines that explain how to use a merged LoRA's embeddings with its CLIP."""
    embeddings, _ = unbundled(Path("merged"), lora)
    return "".join(
        f"\n  {name}: write embedding:{file_name}; Save Merged LoRA puts it into models/embeddings"
        for name, file_name in file_names(embeddings).items()
    )


def save_embeddings(lora: Mapping[str, Tensor], subfolder: str) -> str:
    """Write each embedding into ``subfolder`` of models/embeddings, without overwriting others;
    returns lines that explain how to use them."""
    embeddings, _ = unbundled(Path("merged"), lora)
    root = Path(folder_paths.get_folder_paths("embeddings")[0])
    text = ""
    for name, file_name in file_names(embeddings).items():
        tensors = to_file(name, embeddings[name])
        path = next(p for p in numbered_files(root / subfolder, file_name) if _is_free(p, tensors))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            save_atomically(tensors, path, {"name": name})
        called = path.relative_to(root).with_name(path.stem).as_posix()
        text += f"\nIts embedding {name}: write embedding:{called}"
    return text


def _is_free(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    """True if the name is free, or the file holds just these vectors."""
    if any(path.with_suffix(end).exists() for end in (".pt", ".bin")):
        return False  # ComfyUI would accept either
    if not path.exists():
        return True
    there = load_file(path)
    return there.keys() == tensors.keys() and all(
        torch.equal(there[key], tensors[key]) for key in tensors
    )
