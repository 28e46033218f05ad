"""Samples on disk, by what they depend on: denoising is about half of a merge's forwards, and each
LoRA's samples depend on the base, its own prompts and a few settings, not on the other LoRAs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import OutputError, SettingsError, UsageError

_log = logging.getLogger(__name__)

VERSION = "2"
"""Changes whenever the same key would stand for other samples."""

NONE = "none"
"""In place of a folder: no samples are kept."""
LIMIT = 4 * 2**30
_SUFFIX = ".iteris-store"
_OWN = re.compile(rf"[0-9a-f]{{64}}(\.[0-9a-f]{{8}})?{_SUFFIX}")
"""Names of a store's files: whole ones, and those still being written."""
_WRITING = 3600
"""Seconds after which an unfinished file is one that its process left behind."""
_VALUES = 4096
_PACKAGE = __name__.removesuffix("hosts.sample_store")


@dataclass(frozen=True)
class SampleStore:
    """A ``folder`` of samples (a path, or its text), of which the least recently used go when it
    exceeds ``limit`` bytes; the newest always stays. ``parts`` belong to every key. Several
    processes may share a folder. A file that cannot be read is as good as none, and a full disk
    keeps nothing; neither ends a merge. Raises :class:`OutputError` for a folder that contains
    anything else."""

    folder: Path
    limit: int = LIMIT
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        with suppress(OSError):  # it does not exist yet, or takes nothing
            # What comes there during a merge does not end it.
            for name in () if self.parts else sorted(os.listdir(self.folder)):
                if not (_OWN.fullmatch(name) or name[0] == "."):
                    raise OutputError(
                        f"The folder {self.folder} is no store of samples: it contains {name}. "
                        "Give the store a folder of its own (option store, or ITERIS_STORE)."
                    )

    @staticmethod
    def at(place: Any) -> SampleStore | None:
        """The store in a folder, or the one that is given, or None. Raises :class:`SettingsError`
        for anything else."""
        if isinstance(place, str | Path):
            return SampleStore(Path(place))
        if place is None or isinstance(place, SampleStore):
            return place
        raise SettingsError(f"store must be a folder or a SampleStore, not {place!r}.")

    @staticmethod
    def default() -> Path | None:
        """``ITERIS_STORE``, or ``iteris/samples`` in the user's folder for caches; None if the
        former is ``none``."""
        if folder := os.environ.get("ITERIS_STORE"):
            return None if folder == NONE else Path(folder)
        try:
            caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError as error:
            raise UsageError(
                "The store of samples has no place, because this user has no home folder. Name a "
                "folder (option store, or ITERIS_STORE), or none."
            ) from error
        return caches / "iteris" / "samples"

    def within(self, *parts: str) -> SampleStore:
        """The same store, for what also depends on ``parts``."""
        return replace(self, parts=(*self.parts, *parts))

    def get(self, *parts: str) -> dict[str, Tensor] | None:
        """The tensors kept under these ``parts``, or None."""
        path = self._path(parts)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError, ValueError, RuntimeError):  # torch maps the file again
            return None
        with suppress(OSError):  # the folder may be read only
            os.utime(path)
        return tensors

    def put(self, tensors: Mapping[str, Tensor], *parts: str) -> None:
        """Keep ``tensors``, and let go of what has not been used for longest."""
        path = self._path(parts)
        unfinished = path.with_suffix(f".{secrets.token_hex(4)}{_SUFFIX}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Copies: tensors that share memory, such as two experts' sigmas, are refused.
            copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
            save_file({name: t.contiguous() for name, t in copies.items()}, unfinished)
            unfinished.replace(path)
        except (OSError, SafetensorError) as error:
            _log.warning("Nothing is kept for the next merge: %s", error)
        finally:
            with suppress(OSError):
                unfinished.unlink()
        self._shrink(self.limit, path)

    @property
    def size(self) -> int:
        """Bytes in the folder."""
        return sum(size for _, size, _ in self._files())

    def clear(self) -> int:
        """Remove everything; returns how many bytes that were."""
        return self._shrink(0)

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of the store's own files, the least recently used
        first."""
        files: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("*"):
            if _OWN.fullmatch(path.name):
                with suppress(OSError):  # another process removed it
                    status = path.stat()
                    files.append((status.st_mtime, status.st_size, path))
        return sorted(files)

    def _shrink(self, limit: int, newest: Path | None = None) -> int:
        """Remove files beyond ``limit`` bytes, the least recently used first. With a ``newest``,
        that stays, and so does what another process is writing."""
        files, removed = self._files(), 0
        size = sum(count for _, count, _ in files)
        for used, count, path in files:
            if size - removed <= limit:
                break
            writing = "." in path.stem and time.time() - used < _WRITING
            if newest is not None and (path == newest or writing):
                continue
            with suppress(OSError):
                path.unlink(missing_ok=True)
                removed += count
        return removed

    def _path(self, parts: Sequence[str]) -> Path:
        name = digest((VERSION, torch.__version__, *self.parts, *parts))
        return self.folder / f"{name}{_SUFFIX}"


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


def digest_of_weights(
    named: Iterable[tuple[str, Tensor]], models: Mapping[str, nn.Module] = MappingProxyType({})
) -> str | None:
    """A hash of the types of the modules in ``models``, by the beginning of their names, and of
    weights: of some values of each, because training changes all of them, and of every row of an
    embedding, because a learned token changes one. A quantised weight is made of others
    (``__tensor_flatten__``). None if a weight is not there, as on the device "meta", or is another
    kind of tensor."""
    modules = {
        path: module
        for name, model in models.items()
        for path, module in model.named_modules(prefix=name)
    }
    values: list[Any] = [(path, _kind(module)) for path, module in modules.items()]
    for name, tensor in named:
        tensor = tensor.detach()
        whole = isinstance(modules.get(name.rpartition(".")[0]), nn.Embedding)
        parts = getattr(tensor, "__tensor_flatten__", lambda: ((), None))()[0]
        for part in [getattr(tensor, part) for part in parts] or [tensor]:
            if part.is_meta or type(part) is not Tensor:
                return None
            step = max(1, part.numel() // _VALUES)
            rows = part.split(_VALUES) if whole and part.ndim else [part.reshape(-1)[::step]]
            values.append((name, tuple(tensor.shape), *rows))
    return digest(values)


def _kind(part: object) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def behaviour(models: Mapping[str, nn.Module]) -> list[Any]:
    """For :func:`digest`, what models do beside their weights: attention processors and the
    numbers of FreeU. Raises :class:`TypeError` where code of others is on them, hooks or replaced
    forwards, which have no hash."""
    described: list[Any] = []
    for name, model in models.items():
        for path, module in model.named_modules():
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            forward = vars(module).get("forward")
            if hasattr(module, "_hf_hook"):  # offloading moves weights alone
                forward = getattr(module, "_old_forward", forward)
            unchanged = getattr(forward, "__func__", None) is type(module).forward
            if not all(map(_is_known, hooks)) or not (forward is None or unchanged):
                raise TypeError(f"no hash of what is on {name}.{path}")
            processor = vars(module).get("processor") or module._modules.get("processor")
            if processor is not None:
                kind = _kind(processor)
                if not kind.startswith("diffusers."):
                    raise TypeError(f"no hash of {kind}")
                described.append((name, path, kind, vars(processor)))
            if any(numbers := [vars(module).get(number) for number in ("s1", "s2", "b1", "b2")]):
                described.append((name, path, numbers))
    return described


def _is_known(hook: Any) -> bool:
    """True for a hook of IterIS, or one by which a library makes what is in its weights."""
    module = str(getattr(getattr(hook, "func", hook), "__module__", ""))
    return module.startswith((_PACKAGE, "torch.", "transformers."))
