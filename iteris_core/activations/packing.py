"""Packs half-precision activations into 8 or 4 bits, so that more rows fit in host memory.

A value x in a group becomes the code round(x / s) with the group's s = max |x| / most, so its error
is at most s / 2 (absmax quantisation, as in bitsandbytes); ``most`` is 127 or 7. Infinities become
the largest numbers of their dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .host_pool import OffloadStore, Slot
from .memory import resize


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
