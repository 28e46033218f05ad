"""Lets forwards wait in host memory, so that the device holds only one micro-batch.

While a micro-batch waits at a site, the storages that it made are moved off the device; before it
goes on, they are refilled. Tensors and views remain the same objects, as when FSDP frees and
refills a flat parameter. A storage that has been idle for some pauses is put back only when an
operation needs it, so skip connections move once. A solve's inputs are put back one micro-batch
after another. Weights, storages made outside the forwards, those of tensor subclasses, and those
that cannot be resized stay. A storage that another micro-batch turns out to use (such as a cached
table) is put back for good.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .host_pool import HostPool, Pieces
from .memory import resize, storage_of

IDLE_PAUSES = 3
"""Pauses after which a storage stays away until an operation, including a view, needs it. Kernels
launched outside PyTorch's dispatcher do not trigger this: they get storages made or used since q
when they run after v, or through a view."""


@dataclass(eq=False)
class _Held:
    """A storage of ``size`` bytes and ``dtype`` made by forward ``owner``, last used before its
    pause number ``touched``. While ``away``, its bytes are in ``pieces``; those of a storage that
    is present are a copy that is still valid."""

    storage: weakref.ref[torch.UntypedStorage]
    dtype: torch.dtype
    owner: int
    touched: int
    size: int = 0
    pieces: Pieces | None = None
    away: bool = False


class ActivationOffload(TorchDispatchMode):
    """Active during a sweep, which announces whose turn it is. Forwards wait in ``place``. The
    weights of ``modules`` never move."""

    def __init__(self, place: HostPool, modules: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.place, self._modules = place, modules
        self._held: dict[int, _Held] = {}
        self._forwards: dict[int, dict[int, _Held]] = {}
        self._pauses: dict[int, int] = {}
        self._now: int | None = None
        self._visiting: dict[_Held, None] = {}

    @property
    def away(self) -> int:
        """Bytes currently waiting off the device."""
        waiting = (held.pieces or () for held in self._held.values() if held.away)
        return sum(size for pieces in waiting for _, _, size in pieces)

    def turn(self, forward: int) -> None:
        """``forward`` continues: storages that it used last are put back."""
        self._leave()
        self._now = forward
        pauses = self._pauses.setdefault(forward, 0)
        with _disable_current_modes():
            for held in list(self._forwards.setdefault(forward, {}).values()):
                if held.away and pauses - held.touched < IDLE_PAUSES:
                    self._put_back(held)
                    self._drop(held)  # it may be written to

    def rest(self) -> None:
        """The current forward waits or has ended: its storages are moved off the device."""
        forward, self._now = self._now, None
        if forward is None:
            return
        if not self._pauses[forward]:
            for module in self._modules:
                for weight in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    for plain in _plain(weight):
                        self._remove(plain.untyped_storage()._cdata)
        self._pauses[forward] += 1
        with _disable_current_modes():
            for held in list(self._forwards[forward].values()):
                self._take_off(held)

    @contextmanager
    def aside(self) -> Generator[None]:
        """Context that interrupts a forward's turn: new storages have no owner and stay; storages
        of other forwards that are read are moved off again."""
        now, self._now = self._now, None
        try:
            yield
        finally:
            self._leave()
            self._now = now

    def __exit__(self, *error: Any) -> None:
        """Put back storages that outlive the forwards, such as a table that the model caches."""
        self._now = None
        try:
            with _disable_current_modes():
                for held in list(self._held.values()):
                    if held.away:
                        self._put_back(held)
                    self._drop(held)
        finally:
            self._held.clear()
            self._forwards.clear()
            super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used: list[int] = []
        _storages(args, used)
        if kwargs:
            _storages(kwargs.values(), used)
        known = self._held
        asked = {key: known[key] for key in used if key in known}
        if asked:
            self._touch(asked)
        result = func(*args, **kwargs) if kwargs else func(*args)
        if self._now is not None:
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor):
                    self._note(tensor, used)
        return result

    def _touch(self, asked: Mapping[int, _Held]) -> None:
        """``asked`` are the arguments of one operation."""
        if self._now is None and any(held.away for held in asked.values()):
            self._leave({held.owner for held in asked.values()})
        for key, held in asked.items():
            held.touched = self._pauses[held.owner]
            if held.away:
                with _disable_current_modes():
                    self._put_back(held)
            if self._now is None:
                self._visiting[held] = None
            elif self._now == held.owner:
                self._drop(held)
            else:
                self._remove(key)

    def _note(self, tensor: Tensor, used: Sequence[int]) -> None:
        """Record a result of an operation that ``used`` these storages."""
        storage = storage_of(tensor)
        if storage is None:
            return
        key = storage._cdata
        if key in used or key in self._held or storage.device != self.place.device:
            return
        if type(tensor) is not Tensor or not _resizable(storage):
            return
        assert self._now is not None

        ref = weakref.ref(storage, lambda _: self._remove(key))
        held = _Held(ref, tensor.dtype, self._now, self._pauses[self._now])
        self._held[key] = self._forwards[self._now][key] = held

    def _remove(self, key: int) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._forwards[held.owner].pop(key)
            self._visiting.pop(held, None)
            self._drop(held)

    def _take_off(self, held: _Held) -> None:
        storage = held.storage()
        if storage is None or held.away or not storage.nbytes():
            return
        if not _resizable(storage):  # NumPy or another process shares it by now
            self._remove(storage._cdata)
            return
        if held.pieces is None:
            held.size, held.pieces = storage.nbytes(), self.place.put(storage, held.dtype)
        resize(storage, 0)
        held.away = True

    def _put_back(self, held: _Held) -> None:
        storage = held.storage()
        if storage is not None and held.pieces is not None:
            self.place.fill(storage, held.size, held.dtype, held.pieces)
        held.away = False

    def _leave(self, owners: Set[int] = frozenset()) -> None:
        """Move off again what a solve has read from forwards other than ``owners``."""
        with _disable_current_modes():
            for held in [held for held in self._visiting if held.owner not in owners]:
                del self._visiting[held]
                if held.pieces is not None:
                    self._take_off(held)

    def _drop(self, held: _Held) -> None:
        if held.pieces is not None:
            self.place.free(held.pieces)
            held.pieces = None


def _resizable(storage: torch.UntypedStorage) -> bool:
    # All CUDA storages count as shared.
    return storage.resizable() and not (storage.device.type == "cpu" and storage.is_shared())


def _storages(leaves: Iterable[Any], found: list[int]) -> None:
    """The storages of an operation's arguments. Runs at every operation, so no generators here."""
    for leaf in leaves:
        kind = type(leaf)
        if kind is list or kind is tuple:
            _storages(leaf, found)
        elif kind is Tensor or kind is nn.Parameter:
            storage = storage_of(leaf)
            if storage is not None:
                found.append(storage._cdata)
        elif isinstance(leaf, Tensor):
            found += [plain.untyped_storage()._cdata for plain in _plain(leaf)]


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with their own storage of which ``tensor`` consists."""
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is not None:
        for name in parts()[0]:
            yield from _plain(getattr(tensor, name))
        return
    if storage_of(tensor) is not None:
        yield tensor
