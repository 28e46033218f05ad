"""Host memory in which a device's storages wait, as they are or packed into 8 or 4 bits.

Packed, a value x in a group of 32 becomes the code round(x / s), with the group's s = max |x| /
most in bfloat16, so its error is at most s / 2 (absmax quantisation, as in bitsandbytes); ``most``
is 127 or 7. Infinities become the largest numbers of their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OutOfMemory
from .memory import free_memory, resize, total_memory, usable, wait_for

_SLAB = 256 << 20  # bytes per allocation; pinned memory is rounded up to a power of two
_GRAIN = 512  # bytes, so that every copy is aligned
_PINNED = 0.4
"""Share of host memory that may be pinned. Windows pins at most half, and pinned memory can neither
be swapped nor used by other programs."""
_LEAST_PACKED = 1 << 20
"""Smallest storage in bytes to pack; masks, tables and embeddings wait unpacked."""
_GROUP = 32
_AT_ONCE = 1 << 22  # values that are packed at once; 16 MiB in single precision


Pieces = Sequence[tuple[Tensor, int, int]]
"""Where a storage waits: (allocation, start, bytes) of every piece."""


def free_host() -> int:
    """Bytes of host memory that a merge may use."""
    return usable(free_memory(torch.device("cpu")))


class HostPool:
    """At most ``limit`` bytes (None: what is free), allocated on demand, in which half-precision
    data have ``bits`` bits (None: all is as it was). For a CUDA ``device`` they are pinned if
    possible; the rest is pageable, which is only slower. All copies use the model's stream, so
    nothing has to wait for them. :meth:`close` returns everything to the system."""

    def __init__(
        self, device: torch.device, limit: int | None = None, bits: int | None = None
    ) -> None:
        self.device, self.bits = device, bits
        self.limit = free_host() if limit is None else limit
        self.taken = self.moved = self.pinned = 0
        self._pinnable = round(_PINNED * total_memory()) if device.type == "cuda" else 0
        self._gaps: list[tuple[Tensor, int, int]] = []  # free parts: (allocation, start, stop)

    def close(self) -> None:
        """Release everything; torch would otherwise keep pinned memory for the life of the
        process."""
        self._gaps.clear()
        if self.pinned:
            wait_for(self.device)
            empty_host_cache()

    def put(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> Pieces:
        """Copy the bytes of ``storage``, values of ``dtype``."""
        if bits := self._packs(storage.nbytes(), dtype):
            storage = pack(_values(storage, dtype), bits).untyped_storage()
        size = storage.nbytes()
        pieces = [self._piece(min(_SLAB, size - start)) for start in range(0, size, _SLAB)]
        self._copy(pieces, storage, back=False)
        return pieces

    def fill(
        self, storage: torch.UntypedStorage, size: int, dtype: torch.dtype, pieces: Pieces
    ) -> None:
        """Restore the ``size`` and bytes of ``storage``; they stay in ``pieces`` as well."""
        resize(storage, size)
        if bits := self._packs(size, dtype):
            count = sum(size for _, _, size in pieces)
            packed = torch.empty(count, dtype=torch.uint8, device=storage.device)
            self._copy(pieces, packed.untyped_storage(), back=True)
            unpack(packed, _values(storage, dtype), bits)
        else:
            self._copy(pieces, storage, back=True)

    def free(self, pieces: Pieces) -> None:
        for slab, start, size in pieces:
            stop = start + _grains(size)
            for index in reversed(range(len(self._gaps))):  # join it with its neighbours
                other, begin, end = self._gaps[index]
                if other is slab and (end == start or begin == stop):
                    start, stop = min(start, begin), max(stop, end)
                    del self._gaps[index]
            self._gaps.append((slab, start, stop))
        self._gaps.sort(key=lambda gap: (id(gap[0]), gap[1]))

    def _packs(self, size: int, dtype: torch.dtype) -> int | None:
        """The bits to which a storage of so many bytes is packed (None: it is not)."""
        half = dtype in (torch.float16, torch.bfloat16) and not size % dtype.itemsize
        return self.bits if half and size >= _LEAST_PACKED else None

    def _copy(self, pieces: Pieces, storage: torch.UntypedStorage, *, back: bool) -> None:
        whole = _values(storage, torch.uint8)
        self.moved += len(whole)
        parts = whole.split([size for _, _, size in pieces])
        for (slab, start, size), part in zip(pieces, parts, strict=True):
            piece = slab.narrow(0, start, size)
            target, source = (part, piece) if back else (piece, part)
            target.copy_(source, non_blocking=True)

    def _piece(self, size: int) -> tuple[Tensor, int, int]:
        """A free piece of ``size`` bytes, of a new allocation if none is large enough."""
        wanted = _grains(size)
        for index, (slab, start, stop) in enumerate(self._gaps):
            if stop - start >= wanted:
                rest = start + wanted
                self._gaps[index : index + 1] = [(slab, rest, stop)] if stop > rest else []
                return slab, start, size
        more = min(_SLAB, self.limit - self.taken)
        if more < wanted:
            raise OutOfMemory(
                f"Host memory ran out: rows wait in {self.taken / 2**30:.2f} GiB of it, of "
                f"{self.limit / 2**30:.2f} GiB that may be used, and one more piece of "
                f"{size / 2**20:.1f} MiB does not fit. Lower samples, timesteps or latent_size "
                "(ComfyUI: image_size), or free memory elsewhere."
            )
        slab = None
        if self.pinned + more <= self._pinnable:
            try:
                slab = torch.empty(more, dtype=torch.uint8, pin_memory=True)
                self.pinned += more
            except RuntimeError:  # the system allows less pinning than it has memory
                self._pinnable = 0
        if slab is None:
            slab = torch.empty(more, dtype=torch.uint8)
        self.taken += more
        if more > wanted:
            self._gaps.append((slab, wanted, more))
        return slab, 0, size


def pack(values: Tensor, bits: int) -> Tensor:
    """``values``, (n,) of a floating dtype, as uint8: one code each, then one scale per group. At 4
    bits a byte has two codes, the first in the low half."""
    groups = -(-len(values) // _GROUP)
    packed = torch.empty(groups * _packed_group(bits), dtype=torch.uint8, device=values.device)
    codes, scales = _parts(packed, bits)
    largest, most, step = torch.finfo(values.dtype).max, (1 << (bits - 1)) - 1, _AT_ONCE // _GROUP
    for start in range(0, groups, step):
        part = values[start * _GROUP : (start + step) * _GROUP].float().clamp_(-largest, largest)
        part = torch.nn.functional.pad(part, (0, -len(part) % _GROUP)).view(-1, _GROUP)
        scale = (part.abs().amax(1) / most).bfloat16()
        scales[start : start + len(part)] = scale
        part /= scale.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        code = part.round_().clamp_(-most, most).to(torch.int8)
        if bits == 4:
            code = (code[:, ::2] & 15) | (code[:, 1::2] << 4)
        codes[start : start + len(part)] = code
    return packed


def unpack(packed: Tensor, into: Tensor, bits: int) -> None:
    """Unpack values from :func:`pack` ``into`` (n,)."""
    codes, scales = _parts(packed, bits)
    largest, step = torch.finfo(into.dtype).max, _AT_ONCE // _GROUP
    for start in range(0, len(codes), step):
        code = codes[start : start + step]
        if bits == 4:  # the sign of a half comes back with the shift to the right
            code = torch.stack([code << 4, code], dim=-1).flatten(1) >> 4
        values = code * scales[start : start + step, None].float()
        target = into[start * _GROUP : (start + step) * _GROUP]
        target.copy_(values.view(-1)[: len(target)].clamp_(-largest, largest))


def _packed_group(bits: int) -> int:
    """Bytes of a group: its codes and its scale."""
    return _GROUP * bits // 8 + torch.bfloat16.itemsize


def _parts(packed: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes, (groups, bytes of a group), int8, and scales, (groups,), bfloat16."""
    groups = len(packed) // _packed_group(bits)
    scales = len(packed) - groups * torch.bfloat16.itemsize
    return packed[:scales].view(torch.int8).view(groups, -1), packed[scales:].view(torch.bfloat16)


def empty_host_cache() -> None:
    """Return torch's unused cached pinned memory to the system."""
    old = getattr(torch._C, "_host_emptyCache", None)  # of older versions
    empty: Any = getattr(getattr(torch, "accelerator", None), "empty_host_cache", old)
    if empty is not None:
        empty()


def _grains(size: int) -> int:
    return -(-size // _GRAIN) * _GRAIN


def _values(storage: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage)
