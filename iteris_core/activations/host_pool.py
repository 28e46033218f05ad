"""Host memory in which a device's storages wait, and from which they are refilled."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import OutOfMemory
from .memory import resize, total_memory

_SLAB = (
    256 << 20
)  # bytes per allocation: a power of two, because pinned memory is rounded up to one
_GRAIN = 512  # bytes, so that every copy is aligned
_PINNED = 0.4
"""Share of host memory that may be pinned. Windows pins at most half, and pinned memory can neither
be swapped nor used by other programs."""
_pinnable: ContextVar[int | None] = ContextVar("pinnable", default=None)


@dataclass(eq=False)
class Slot:
    """The location of one waiting storage: ``pieces`` of slabs, as bytes; if ``packed``, also its
    original dtype and size in bytes."""

    pieces: Sequence[Tensor]
    packed: tuple[torch.dtype, int] | None = None

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.pieces))


@contextmanager
def pinning_at_most(size: int | None) -> Generator[None]:
    """Context in which every new :class:`HostPool` pins at most ``size`` bytes, because an
    application has pinned others (None: no such limit)."""
    token = _pinnable.set(size)
    try:
        yield
    finally:
        _pinnable.reset(token)


class OffloadStore(Protocol):
    """A place where storages of ``device`` wait: a :class:`HostPool`, possibly with packing."""

    device: torch.device

    def put(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> Slot: ...
    def fill(self, storage: torch.UntypedStorage, slot: Slot) -> None: ...
    def free(self, slot: Slot) -> None: ...


class HostPool:
    """At most ``limit`` bytes, allocated on demand. For a CUDA ``device`` they are pinned if
    possible; the rest is pageable, which is only slower.

    All copies use the model's stream, so nothing has to wait for them. :meth:`close` returns
    everything to the system.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.device, self.limit = device, limit
        self.taken = self.moved = self.pinned = 0
        most = _pinnable.get()
        own = round(_PINNED * total_memory()) if device.type == "cuda" else 0
        self._pinnable = own if most is None else min(own, most)
        self._slabs: list[_Slab] = []

    def close(self) -> None:
        """Release everything; torch would otherwise keep pinned memory for the life of the
        process."""
        self._slabs.clear()
        if self.pinned:
            wait_for(self.device)
            empty_host_cache()

    def put(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> Slot:
        """Copy the bytes of ``storage``, of any ``dtype``."""
        size = storage.nbytes()
        slot = Slot([self._piece(min(_SLAB, size - start)) for start in range(0, size, _SLAB)])
        self._copy(slot, storage, back=False)
        return slot

    def fill(self, storage: torch.UntypedStorage, slot: Slot) -> None:
        """Restore the size and bytes of ``storage``; they stay in ``slot`` as well."""
        resize(storage, slot.nbytes)
        self._copy(slot, storage, back=True)

    def free(self, slot: Slot) -> None:
        for piece in slot.pieces:
            slab = next(slab for slab in self._slabs if slab.has(piece))
            slab.free(piece)

    def _copy(self, slot: Slot, storage: torch.UntypedStorage, *, back: bool) -> None:
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self.moved += len(whole)
        parts = whole.split([len(piece) for piece in slot.pieces])
        for piece, part in zip(slot.pieces, parts, strict=True):
            if back:
                part.copy_(piece, non_blocking=True)
            else:
                piece.copy_(part, non_blocking=True)

    def _piece(self, size: int) -> Tensor:
        for slab in self._slabs:
            piece = slab.take(size)
            if piece is not None:
                return piece
        more = min(_SLAB, self.limit - self.taken)
        if more < _grains(size):
            raise OutOfMemory(
                f"Host memory ran out: rows wait in {self.taken / 2**30:.2f} GiB of it, of "
                f"{self.limit / 2**30:.2f} GiB that may be used, and one more piece of "
                f"{size / 2**20:.1f} MiB does not fit. Lower samples, timesteps or latent_size "
                "(ComfyUI: image_size), or free memory elsewhere."
            )
        self._slabs.append(_Slab(self._allocated(more)))
        self.taken += more
        piece = self._slabs[-1].take(size)
        assert piece is not None
        return piece

    def _allocated(self, size: int) -> Tensor:
        if self.pinned + size <= self._pinnable:
            try:
                memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # the system allows less pinning than it has memory
                self._pinnable = 0
            else:
                self.pinned += size
                return memory
        return torch.empty(size, dtype=torch.uint8)


class _Slab:
    """One allocation; ``gaps`` are its free parts, as [start, stop), ascending."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._gaps = [(0, len(memory))]

    def has(self, piece: Tensor) -> bool:
        return piece.untyped_storage()._cdata == self._memory.untyped_storage()._cdata

    def take(self, size: int) -> Tensor | None:
        wanted = _grains(size)
        for index, (start, stop) in enumerate(self._gaps):
            if stop - start >= wanted:
                rest = start + wanted
                self._gaps[index : index + 1] = [(rest, stop)] if stop > rest else []
                return self._memory.narrow(0, start, size)
        return None

    def free(self, piece: Tensor) -> None:
        start = int(piece.storage_offset())
        gaps = sorted([*self._gaps, (start, start + _grains(len(piece)))])
        self._gaps = gaps[:1]
        for begin, stop in gaps[1:]:
            if begin == self._gaps[-1][1]:
                self._gaps[-1] = (self._gaps[-1][0], stop)
            else:
                self._gaps.append((begin, stop))


def empty_host_cache() -> None:
    """Return torch's unused cached pinned memory to the system."""
    accelerator: Any = getattr(torch, "accelerator", None)
    empty = getattr(accelerator, "empty_host_cache", None)
    empty = empty or getattr(torch._C, "_host_emptyCache", None)  # older versions
    if empty is not None:
        empty()


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "xpu":
        torch.xpu.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _grains(size: int) -> int:
    return -(-size // _GRAIN) * _GRAIN
