"""ComfyUI's folders for LoRAs, by names that say nothing of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import folder_paths

from ..iteris_core.errors import IterisError

_END = ".safetensors"
_DEFAULT = "default"


def folder_names() -> list[str]:
    """``default``, and of each other folder the last two parts, numbered where others have them."""
    names = [_DEFAULT]
    for folder in folder_paths.get_folder_paths("loras")[1:]:
        name = "/".join(Path(folder).parts[-2:])
        names.append(name if name not in names else f"{name} ({len(names)})")
    return names


def new_file(prefix: str, folder: str = _DEFAULT, *, overwrite: bool = False) -> tuple[Path, str]:
    """A file that is not there, unless it may be written over, and the folder below the one for
    LoRAs; ``prefix`` may hold what Save Image understands, such as %year%."""
    prefix = prefix.strip().removesuffix(_END)
    names = folder_names()
    if folder not in names:
        raise IterisError(f"There is no folder {folder} for LoRAs; there are {', '.join(names)}.")
    at = names.index(folder)
    root = os.path.abspath(folder_paths.get_folder_paths("loras")[at])
    target = os.path.normpath(os.path.join(root, prefix))
    if not prefix or prefix.endswith(("/", os.sep)) or target == root:
        raise IterisError("Save Merged LoRA has no name; write one as filename_prefix.")
    if not target.startswith(root + os.sep):
        raise IterisError(
            f"{prefix} leads out of the folder for LoRAs; write a name or folder/name."
        )
    where, name, _, subfolder, _ = folder_paths.get_save_image_path(prefix, root)
    candidates = numbered_files(Path(where), name)
    file = next(path for path in candidates if overwrite or not path.exists())
    return file, subfolder


def numbered_files(folder: Path, name: str) -> Iterator[Path]:
    """NAME.safetensors, NAME_2.safetensors, …"""
    return (folder / f"{name}{f'_{n}' if n > 1 else ''}{_END}" for n in count(1))
