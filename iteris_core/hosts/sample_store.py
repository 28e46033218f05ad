"""Samples on disk, by what they depend on: denoising is about half of a merge's forwards, and each
LoRA's samples depend on the base, its own prompts and a few settings, not on the other LoRAs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import IterisError
from ..saving import atomically

_log = logging.getLogger(__name__)

VERSION = "2"
"""Changes whenever the same key would stand for other samples."""

LIMIT = 4 * 2**30
_VALUES = 4096


@dataclass(frozen=True)
class SampleStore:
    """A ``folder`` of samples, of which the least recently used go when it exceeds ``limit`` bytes.
    ``parts`` belong to every key. Several processes may share a folder. A file that cannot be read
    is as good as none, and a full disk keeps nothing; neither ends a merge."""

    folder: Path
    limit: int = LIMIT
    parts: tuple[str, ...] = ()

    @staticmethod
    def default() -> Path:
        """``ITERIS_STORE``, or ``iteris/samples`` in the user's folder for caches."""
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return Path(os.environ.get("ITERIS_STORE") or caches / "iteris" / "samples")

    def within(self, *parts: str) -> SampleStore:
        """The same store, for what also depends on ``parts``."""
        return replace(self, parts=(*self.parts, *parts))

    def get(self, *parts: str) -> dict[str, Tensor] | None:
        """The tensors kept under these ``parts``, or None."""
        path = self._path(parts)
        with suppress(OSError, SafetensorError, ValueError):
            tensors = load_file(path)
            os.utime(path)
            return tensors
        return None

    def put(self, tensors: Mapping[str, Tensor], *parts: str) -> None:
        """Keep ``tensors``, and let go of what has not been used for longest."""
        path = self._path(parts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomically(path) as unfinished:
                # Copies: tensors that share memory, such as two experts' sigmas, are refused.
                copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
                save_file({name: t.contiguous() for name, t in copies.items()}, unfinished)
        except (IterisError, OSError) as error:
            _log.warning("Nothing is kept for the next merge: %s", error)
        self._shrink(self.limit)

    @property
    def size(self) -> int:
        """Bytes in the folder."""
        return sum(size for _, size, _ in self._files())

    def clear(self) -> int:
        """Remove everything; returns how many bytes that were."""
        return self._shrink(0)

    def _files(self) -> list[tuple[float, int, Path]]:
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(OSError):  # another process removed it
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        return sorted(found)

    def _shrink(self, limit: int) -> int:
        files, removed = self._files(), 0
        size = sum(own for _, own, _ in files)
        for _, own, path in files:
            if size - removed <= limit:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
                removed += own
        return removed

    def _path(self, parts: Sequence[str]) -> Path:
        name = digest((VERSION, torch.__version__, *self.parts, *parts))
        return self.folder / f"{name}.safetensors"


def digest(value: Any) -> str:
    """A hash of numbers, texts, tensors, images, and sequences and mappings of them. Raises
    :class:`TypeError` for anything else."""

    def hashed(part: Any) -> Any:
        if isinstance(part, Mapping):
            return dict(part)  # pyright: ignore
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous()
            kind, content = f"{part.dtype}{tuple(part.shape)}", part.reshape(-1).view(torch.uint8)
            return [kind, hashlib.sha256(content.numpy()).hexdigest()]
        if hasattr(part, "tobytes") and hasattr(part, "size"):  # a picture, or an array
            return [f"{part.size}", hashlib.sha256(part.tobytes()).hexdigest()]
        raise TypeError(f"no hash of a {type(part).__name__}")

    return hashlib.sha256(json.dumps(value, sort_keys=True, default=hashed).encode()).hexdigest()


def digest_of_weights(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """A hash of a model's weights, of some values of each: training changes all of them. A
    quantised one is made of others (``__tensor_flatten__``). None if a weight is not there, as on
    the device "meta", or is another kind of tensor."""
    values: list[Any] = []
    for name, tensor in named:
        tensor = tensor.detach()
        parts = getattr(tensor, "__tensor_flatten__", lambda: ((), None))()[0]
        for part in [getattr(tensor, part) for part in parts] or [tensor]:
            if part.is_meta or type(part) is not Tensor:
                return None
            step = max(1, part.numel() // _VALUES)
            values.append((name, tuple(tensor.shape), part.reshape(-1)[::step]))
    return digest(values)
