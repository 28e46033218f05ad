"""Forwards that wait in host memory instead of on the device.

In a sweep every micro-batch waits at each site with all that it needs to run on. Here what it made
on the device is taken off while it waits, storage by storage, and put back before it goes on, as
FSDP frees and refills a flat parameter: tensors and views stay the objects that they are. The
device holds one micro-batch, whatever their number.

A storage that has rested for some pauses is put back only when an operation asks for it (skip
connections cross once instead of at every site), and so is what a solve reads, one micro-batch
after the other. Left where they are: weights, storages made outside of the forwards, those of
tensor subclasses and those that cannot be resized; and what another micro-batch turns out to use
(tables that a model keeps) is put back for good.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .host_pool import Place, Slot
from .meter import storage_of

IDLE_PAUSES = 3
"""Pauses after which a storage stays away until an operation asks for it, a view included. Kernels
that are launched past PyTorch's dispatcher ask for nothing: they get what was made or used since q,
when they run after v, or by way of a view."""


@dataclass(eq=False)
class _Held:
    """A storage of ``dtype`` that forward ``owner`` made, last used before its pause number
    ``touched``. While it is ``away`` its bytes are in ``slot``; a slot beside a storage that is
    there is a copy that still holds."""

    storage: weakref.ref[torch.UntypedStorage]
    dtype: torch.dtype
    owner: int
    touched: int
    slot: Slot | None = None
    away: bool = False


class ActivationOffload(TorchDispatchMode):
    """On around a sweep, which says whose turn it is. Forwards in ``stay`` wait on the device.

    ``modules`` are those whose weights are never moved. ``left`` counts the bytes that the forwards
    made and that could not be moved.
    """

    def __init__(
        self, place: Place, stay: Set[int] = frozenset(), modules: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__()
        self.left = 0
        self._place = place
        self.stay = stay
        self._modules = modules
        self._held: dict[int, _Held] = {}
        self._forwards: dict[int, dict[int, _Held]] = {}
        self._pauses: dict[int, int] = {}
        self._now: int | None = None
        self._visiting: dict[_Held, None] = {}

    @property
    def away(self) -> int:
        """Bytes that wait in the place now."""
        return sum(h.slot.nbytes for h in self._held.values() if h.away and h.slot is not None)

    def turn(self, forward: int) -> None:
        """``forward`` goes on: what it used last is put back."""
        self._leave()
        self._now = forward
        pauses = self._pauses.setdefault(forward, 0)
        with _disable_current_modes():
            for held in list(self._forwards.setdefault(forward, {}).values()):
                if held.away and pauses - held.touched < IDLE_PAUSES:
                    self._put_back(held)
                    self._drop(held)  # nobody knows whether it is written to

    def rest(self) -> None:
        """The forward whose turn it is waits, or has ended: what it holds is taken off."""
        forward, self._now = self._now, None
        if forward is None or forward in self.stay:
            return
        if not self._pauses[forward]:
            for key in self._weights() & self._held.keys():
                self._remove(key)
        self._pauses[forward] += 1
        with _disable_current_modes():
            for held in list(self._forwards[forward].values()):
                self._take_off(held)

    @contextmanager
    def aside(self) -> Generator[None]:
        """Within it a forward's turn is interrupted: what is made is nobody's, and stays; what is
        read of other forwards is taken off again."""
        now, self._now = self._now, None
        try:
            yield
        finally:
            self._leave()
            self._now = now

    def __exit__(self, *error: Any) -> None:
        """Put back what outlives the forwards, such as a table that the model has made."""
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
        asked = [known[key] for key in used if key in known]
        if asked:
            self._touch(asked)
        result = func(*args, **kwargs) if kwargs else func(*args)
        now = self._now
        if now is not None and now not in self.stay:
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor):
                    self._note(tensor, used)
        return result

    def _touch(self, asked: Sequence[_Held]) -> None:
        """``asked`` are the arguments of one operation."""
        if self._now is None and any(held.away for held in asked):
            self._leave({held.owner for held in asked})
        for held in asked:
            held.touched = self._pauses[held.owner]
            if held.away:
                with _disable_current_modes():
                    self._put_back(held)
            if self._now is None:
                self._visiting[held] = None
            elif self._now == held.owner:
                self._drop(held)
            else:
                self._forget(held)

    def _note(self, tensor: Tensor, used: Sequence[int]) -> None:
        """A result of an operation on storages that were ``used``."""
        storage = storage_of(tensor)
        if storage is None:
            return
        key = storage._cdata
        if key in used or key in self._held or storage.device != self._place.device:
            return
        if type(tensor) is not Tensor or not _resizable(storage):
            self.left += storage.nbytes()
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
        if not _resizable(storage):  # NumPy or another process has it by now
            self._forget(held)
            return
        if held.slot is None:
            held.slot = self._place.put(storage, held.dtype)
        else:
            self._place.empty(storage)
        held.away = True

    def _put_back(self, held: _Held) -> None:
        storage = held.storage()
        if storage is not None and held.slot is not None:
            self._place.fill(storage, held.slot)
        held.away = False

    def _leave(self, owners: Set[int] = frozenset()) -> None:
        """Take off again what a solve has read of other forwards than ``owners``."""
        with _disable_current_modes():
            for held in [held for held in self._visiting if held.owner not in owners]:
                del self._visiting[held]
                if held.slot is not None:
                    self._take_off(held)

    def _drop(self, held: _Held) -> None:
        if held.slot is not None:
            self._place.free(held.slot)
            held.slot = None

    def _forget(self, held: _Held) -> None:
        storage = held.storage()
        if storage is not None:
            self._remove(storage._cdata)
            self.left += storage.nbytes()

    def _weights(self) -> set[int]:
        weights = (
            tensor
            for module in self._modules
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        )
        return {plain.untyped_storage()._cdata for weight in weights for plain in _plain(weight)}


def _resizable(storage: torch.UntypedStorage) -> bool:
    # All of CUDA's count as shared.
    return storage.resizable() and not (storage.device.type == "cpu" and storage.is_shared())


def _storages(leaves: Iterable[Any], found: list[int]) -> None:
    """The storages of an operation's arguments. At every operation: no generators here."""
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
    """The tensors with a storage of their own that ``tensor`` is made of."""
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is not None:
        for name in parts()[0]:
            yield from _plain(getattr(tensor, name))
        return
    if storage_of(tensor) is not None:
        yield tensor
