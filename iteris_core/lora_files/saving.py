"""Safetensors files that appear under their name only when they are whole."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save, save_file
from torch import Tensor


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors without the metadata (modelspec: of everything behind the header)."""
    data = save(dict(tensors))
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    handle, temporary = tempfile.mkstemp(suffix=".tmp", prefix=f".{path.stem}-", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp's are for the owner only
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def umask() -> int:
    """The process's file mode creation mask."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
