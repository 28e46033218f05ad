"""``NAME.metadata.json`` beside a saved LoRA, in the layout that Lora-Manager reads: it refuses a
file that lacks one of the first eight entries. It puts the folder before ``file_path`` and
``preview_url`` itself; a path of this machine is not written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..iteris_core.errors import IterisError
from ..iteris_core.lora_files import read_header
from ..iteris_core.lora_files.metadata import noted_phrases, previews
from ..iteris_core.lora_files.tensors import file_digest
from ..iteris_core.saving import atomically

_BASES = {
    "stable-diffusion-v1": "SD 1.5",
    "stable-diffusion-v2": "SD 2.1",
    "stable-diffusion-xl": "SDXL 1.0",
    "stable-diffusion-3": "SD 3",
    "flux-1": "Flux.1 D",
}
"""``modelspec.architecture`` begins so → Lora-Manager's name."""


def metadata_file(file: Path) -> Path:
    return file.with_suffix(".metadata.json")


def is_free_for_metadata(file: Path) -> bool:
    """True if nothing is there, or just what :func:`write_metadata` wrote for ``file``."""
    there = metadata_file(file)
    if not there.exists():
        return True
    try:
        return there.read_text(encoding="utf-8") == _text_of(file)
    except (IterisError, OSError, UnicodeError):
        return False


def write_metadata(file: Path) -> None:
    with atomically(metadata_file(file)) as unfinished:
        unfinished.write_text(_text_of(file), encoding="utf-8")


def _text_of(file: Path) -> str:
    metadata, state = read_header(file)[1], file.stat()
    limits = {name: metadata[name] for name in ("strength_min", "strength_max") if name in metadata}
    content = {
        "file_name": file.stem,
        "model_name": metadata.get("modelspec.title") or file.stem,
        "file_path": file.name,
        "size": state.st_size,
        "modified": state.st_mtime,
        "sha256": file_digest(file),
        "base_model": _base(metadata),
        "preview_url": next((picture.name for picture in previews(file)), ""),
        "notes": metadata.get("modelspec.description", ""),
        "from_civitai": False,
        "civitai": {"trainedWords": noted_phrases(metadata)},
        "tags": ["iteris"],
        "usage_tips": json.dumps({name: float(limit) for name, limit in limits.items()}),
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def _base(metadata: Mapping[str, str]) -> str:
    architecture = metadata.get("modelspec.architecture", "")
    known = (name for start, name in _BASES.items() if architecture.startswith(start))
    return next(known, "Unknown")
