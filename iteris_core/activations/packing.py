"""Half-precision activations at 8 bits, so that twice as many rows wait in host memory.

A value x of a group of :data:`GROUP` becomes the code round(x / s) with s = max |x| / 127 of the
group, so that it is off by s / 2 at most (absmax quantisation, as of bitsandbytes). Infinities
become the largest numbers of their dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .host_pool import Place, Slot
from .meter import resize

GROUP = 128
_SCALE = 4  # bytes
_LEAST = 1 << 20
"""Bytes of the smallest storage that is packed: masks, tables and embeddings wait as they are."""
KINDS = (torch.float16, torch.bfloat16)
_AT_ONCE = 1 << 15  # groups, which take 16 MiB in single precision


class PackedPlace:
    """A place in which what is in half precision waits at 8 bits, and all else as it is."""

    def __init__(self, place: Place, least: int = _LEAST) -> None:
        self._place, self._least = place, least
        self.device = place.device

    def put(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> Slot:
        size = storage.nbytes()
        if dtype not in KINDS or size < self._least or size % dtype.itemsize:
            return self._place.put(storage, dtype)
        packed = pack(_values(storage, dtype))
        slot = self._place.put(packed.untyped_storage(), torch.uint8)
        slot.packed = dtype, size
        resize(storage, 0)
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
        unpack(whole, _values(storage, dtype))

    def empty(self, storage: torch.UntypedStorage) -> None:
        self._place.empty(storage)

    def free(self, slot: Slot) -> None:
        self._place.free(slot)


def pack(values: Tensor) -> Tensor:
    """``values``, (n,) of a floating dtype, as uint8: a code each, then a scale for each group."""
    groups = -(-len(values) // GROUP)
    packed = torch.empty(groups * (GROUP + _SCALE), dtype=torch.uint8, device=values.device)
    codes, scales = _parts(packed)
    most = torch.finfo(values.dtype).max
    for start in range(0, groups, _AT_ONCE):
        some = values[start * GROUP : (start + _AT_ONCE) * GROUP].float().clamp_(-most, most)
        some = torch.nn.functional.pad(some, (0, -len(some) % GROUP)).view(-1, GROUP)
        scale = some.abs().amax(1) / 127
        scales[start : start + len(some)] = scale
        some /= scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes[start : start + len(some)] = some.round_().to(torch.int8)
    return packed


def unpack(packed: Tensor, into: Tensor) -> None:
    """Write the values that :func:`pack` has packed ``into`` (n,)."""
    codes, scales = _parts(packed)
    for start in range(0, len(codes), _AT_ONCE):
        some = codes[start : start + _AT_ONCE] * scales[start : start + _AT_ONCE, None]
        target = into[start * GROUP : (start + _AT_ONCE) * GROUP]
        target.copy_(some.view(-1)[: len(target)])


def _parts(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, (groups, :data:`GROUP`), int8, and scales, (groups,), float32."""
    codes = packed[: len(packed) // (GROUP + _SCALE) * GROUP]
    return codes.view(torch.int8).view(-1, GROUP), packed[len(codes) :].view(torch.float32)


def _values(storage: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage)
