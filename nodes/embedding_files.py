"""The embeddings of a merged LoRA: how they are called for, and their files in models/embeddings,
where ComfyUI looks for ``embedding:NAME``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import folder_paths
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..iteris_core.lora_files.embeddings import file_names, to_file, unbundled
from ..iteris_core.lora_files.tensors import save_atomically
from .lora_folders import numbered_files


def how_to_call(lora: Mapping[str, Tensor]) -> str:
    """Lines that say what calls for the embeddings of a merged LoRA in its CLIP."""
    embeddings, _ = unbundled(Path("merged"), lora)
    return "".join(
        f"\n  {name}: write embedding:{file_name}; Save Merged LoRA puts it into models/embeddings"
        for name, file_name in file_names(embeddings).items()
    )


def save_embeddings(lora: Mapping[str, Tensor], subfolder: str) -> str:
    """Write each embedding into ``subfolder`` of models/embeddings, never over another, and give
    lines that say what calls for them."""
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
    """True if nothing is there, or just these vectors."""
    if any(path.with_suffix(end).exists() for end in (".pt", ".bin")):
        return False  # ComfyUI would take either
    if not path.exists():
        return True
    there = load_file(path)
    return there.keys() == tensors.keys() and all(
        torch.equal(there[key], tensors[key]) for key in tensors
    )
