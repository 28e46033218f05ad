"""Host memory in which a device's storages wait, as they are or packed into 8 or 4 bits.

Packed, a value x in a group becomes the code round(x / s) with the group's s = max |x| / most, so
its error is at most s / 2 (absmax quantisation, as in bitsandbytes); ``most`` is 127 or 7.
Infinities become the largest numbers of their dtype.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
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


@dataclass(frozen=True)
class Format:
    """``bits`` per code; the codes of a ``group`` share one number of dtype ``scale``."""

    bits: int
    group: int
    scale: torch.dtype

    @property
    def most(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def width(self) -> int:
        """Bytes for a group's codes."""
        return self.group * self.bits // 8


FORMATS: Mapping[int, Format] = {
    8: Format(8, 128, torch.float32),
    4: Format(4, 32, torch.bfloat16),
}
_LEAST = 1 << 20
"""Smallest storage in bytes to pack; masks, tables and embeddings wait unpacked."""
KINDS = (torch.float16, torch.bfloat16)
_AT_ONCE = 1 << 22  # values; 16 MiB in single precision


class PackedPlace:
    """A place in which half-precision data wait at 8 or 4 ``bits``, and all other data
    unchanged."""

    def __init__(self, place: OffloadStore, bits: int, least: int = _LEAST) -> None:
        self._place, self._format, self._least = place, FORMATS[bits], least
        self.device = place.device

    def put(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> Slot:
        size = storage.nbytes()
        if dtype not in KINDS or size < self._least or size % dtype.itemsize:
            return self._place.put(storage, dtype)
        packed = pack(_values(storage, dtype), self._format)
        slot = self._place.put(packed.untyped_storage(), torch.uint8)
        slot.packed = dtype, size
        return slot

    def fill(self, storage: torch.UntypedStorage, slot: Slot) -> None:
        if slot.packed is None:
            self._place.fill(storage, slot)
            return
        dtype, size = slot.packed
        packed = torch.empty(0, dtype=torch.uint8, device=storage.device)
        self._place.fill(packed.untyped_storage(), slot)
        resize(storage, size)
        whole = packed.new_empty(0).set_(packed.untyped_storage())
        unpack(whole, _values(storage, dtype), self._format)

    def free(self, slot: Slot) -> None:
        self._place.free(slot)


def pack(values: Tensor, form: Format) -> Tensor:
    """``values``, (n,) of a floating dtype, as uint8: one code each, then one scale per group."""
    groups = -(-len(values) // form.group)
    size = groups * (form.width + form.scale.itemsize)
    packed = torch.empty(size, dtype=torch.uint8, device=values.device)
    codes, scales = _parts(packed, form)
    most, step = torch.finfo(values.dtype).max, _AT_ONCE // form.group
    for start in range(0, groups, step):
        some = values[start * form.group : (start + step) * form.group].float().clamp_(-most, most)
        some = torch.nn.functional.pad(some, (0, -len(some) % form.group)).view(-1, form.group)
        scale = (some.abs().amax(1) / form.most).to(form.scale)
        scales[start : start + len(some)] = scale
        some /= scale.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        some = some.round_().clamp_(-form.most, form.most).to(torch.int8)
        codes[start : start + len(some)] = _joined(some, form)
    return packed


def unpack(packed: Tensor, into: Tensor, form: Format) -> None:
    """Unpack values from :func:`pack` ``into`` (n,)."""
    codes, scales = _parts(packed, form)
    most, step = torch.finfo(into.dtype).max, _AT_ONCE // form.group
    for start in range(0, len(codes), step):
        scale = scales[start : start + step, None].float()
        some = _parted(codes[start : start + step], form) * scale
        target = into[start * form.group : (start + step) * form.group]
        target.copy_(some.view(-1)[: len(target)].clamp_(-most, most))


def _joined(codes: Tensor, form: Format) -> Tensor:
    """(groups, group), int8, as bytes; at 4 bits, two codes per byte, the first in the low half."""
    if form.bits == 8:
        return codes.view(torch.uint8)
    low, high = (codes + 8).view(torch.uint8).view(len(codes), -1, 2).unbind(-1)
    return low + (high << 4)


def _parted(codes: Tensor, form: Format) -> Tensor:
    """The inverse of :func:`_joined`: int8 codes."""
    if form.bits == 8:
        return codes.view(torch.int8)
    both = torch.stack([codes & 15, codes >> 4], dim=-1)
    return both.view(len(codes), -1).view(torch.int8) - 8


def _parts(packed: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Codes, (groups, bytes of a group), uint8, and scales, (groups,)."""
    groups = len(packed) // (form.width + form.scale.itemsize)
    codes = packed[: groups * form.width]
    return codes.view(-1, form.width), packed[len(codes) :].view(form.scale)


def _values(storage: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage)
