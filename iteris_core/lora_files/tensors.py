"""Safetensors files: checked on reading, and written under their name only when complete.

Pickled files are refused unopened.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from ..errors import LoraFileError, OutOfMemory
from ..saving import atomically

_FLOATS = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
_PIECE = 2**20
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shape of every tensor, by key, and the metadata of a safetensors file; reads only the
    header. Raises :class:`LoraFileError` for anything but a complete safetensors file."""
    with _opened(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return shapes, dict(file.metadata() or {})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, in their own dtypes, and the metadata of a safetensors file.

    Raises :class:`LoraFileError` for anything but a complete safetensors file, for NaN or Inf, and
    for dtypes that are not plain real numbers (packed 4-bit, complex, …).
    """
    with _opened(path) as file:
        metadata = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if not tensors:
        raise LoraFileError(f"{path} contains no tensors; it is not a LoRA file.")
    for key, tensor in tensors.items():
        _check_numbers(path, key, tensor)
    return tensors, metadata


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    """The file, opened by safetensors; other kinds of file are refused unopened."""
    if not path.is_file():
        raise LoraFileError(f"{path} does not exist or is not a file; check the path.")
    with path.open("rb") as file:
        head = file.read(64)
    # A safetensors file starts with a length, whose first bytes may match too, and then JSON.
    if head[8:9] != b"{":
        _refuse_other_kinds(path, head)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        if "allocate memory" in str(error):
            raise OutOfMemory(
                f"Host memory ran out while reading {path}; free memory elsewhere."
            ) from error
        raise LoraFileError(
            f"{path} is not a complete safetensors file ({error}); download or save it again."
        ) from error


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    if head[:2] == b"PK" or head[:1] == b"\x80":
        raise LoraFileError(
            f"{path} is a pickled PyTorch file, which could run code when opened; convert it to "
            "safetensors if you trust its source."
        )
    if head.startswith(b"version https://git-lfs"):
        raise LoraFileError(
            f"{path} is a Git LFS pointer, a few lines of text in place of the real file; run git "
            "lfs pull, or download the file itself."
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise LoraFileError(
            f"{path} is a web page, not a safetensors file; the download may have asked for a "
            "login. Download the file again."
        )


def _check_numbers(path: Path, key: str, tensor: Tensor) -> None:
    if tensor.dtype in _INTEGERS:
        return
    if tensor.dtype not in _FLOATS:
        raise LoraFileError(
            f"{path}: tensor {key} is {tensor.dtype}, which is not supported; save the file as "
            "float16, bfloat16, float32 or float8."
        )
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    # The sum takes a twentieth of the time.
    if not math.isfinite(float(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        raise LoraFileError(
            f"{path}: tensor {key} contains NaN or infinite values; the file is broken or its "
            "training diverged."
        )


def file_digest(path: Path) -> str:
    """SHA-256 of the whole file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def dtypes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of tensors of each dtype, without alphas."""
    names = (str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.numel() > 1)
    return dict(Counter(names).most_common())


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors without the metadata (modelspec: of everything after the header)."""
    data = save(dict(tensors))
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file. Raises :class:`SaveError` like :func:`..saving.atomically`."""
    with atomically(path) as unfinished:
        save_tensors(tensors, unfinished, metadata)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    path.touch()
    mode = path.stat().st_mode  # safetensors creates files readable by the owner only
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)
