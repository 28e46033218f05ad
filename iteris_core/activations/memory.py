"""Memory of tensors: what is live while something runs, what is free, and retries with less."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import OutOfMemory, brief

_Way = TypeVar("_Way")
_Made = TypeVar("_Made")


class MemoryMeter(TorchDispatchMode):
    """Context that counts the bytes of new tensors still alive, ``live`` and ``peak``, on any
    device, without allocator rounding and caching, and kernel workspaces."""

    _on: ClassVar[list[MemoryMeter]] = []

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __enter__(self) -> MemoryMeter:
        MemoryMeter._on.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        MemoryMeter._on.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_in((args, kwargs)):
            self._note(tensor, 0)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            self._note(tensor, None)
        return result

    def _note(self, tensor: Tensor, size: int | None) -> None:
        storage = storage_of(tensor)
        if storage is None:
            return
        size = storage.nbytes() if size is None else size
        key = storage._cdata
        known = self._known.get(key)
        if known is not None and known[0]() is not None:
            return

        def freed(_: Any) -> None:
            self.live -= self._known.pop(key)[1]

        self._known[key] = weakref.ref(storage, freed), size
        self._add(size)

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        ref, before = self._known.get(storage._cdata, (None, 0))
        if ref is not None and ref() is storage:
            self._known[storage._cdata] = ref, storage.nbytes()
            self._add(storage.nbytes() - before)


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """A tensor's storage; None for quantised, sparse and other tensors without their own."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def resize(storage: torch.UntypedStorage, size: int) -> None:
    """Resize ``storage``; meters could not see this otherwise."""
    storage.resize_(size)
    for meter in MemoryMeter._on:  # pyright: ignore[reportPrivateUsage]
        meter._resized(storage)  # pyright: ignore[reportPrivateUsage]


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of a ``tree``."""
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


_KEPT_FREE = 0.1  # share of free memory, for allocator rounding and libraries


def usable(free: int) -> int:
    """The part of ``free`` bytes on which a plan may count."""
    return round((1 - _KEPT_FREE) * free)


def with_spare(size: int) -> int:
    """Free bytes needed so that a plan may count on ``size``."""
    return math.ceil(size / (1 - _KEPT_FREE))


def free_memory(device: torch.device) -> int:
    """Free bytes on the device or the machine, including PyTorch's cache."""
    if is_apart(device):
        of_device: Any = getattr(torch, device.type)
        with suppress(RuntimeError):  # an integrated XPU has none, and shares the machine's memory
            free, _ = of_device.mem_get_info(device)
            kept = of_device.memory_reserved(device) - of_device.memory_allocated(device)
            return free + kept
    import psutil

    return int(psutil.virtual_memory().available)


def total_memory() -> int:
    """Total bytes of memory of the machine."""
    import psutil

    return int(psutil.virtual_memory().total)


def is_apart(device: torch.device) -> bool:
    """True if the device has its own memory."""
    return device.type in ("cuda", "xpu")


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    # torch.accelerator is not in every ComfyUI's torch.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "xpu":
        torch.xpu.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """True for any device's out-of-memory error; CPUs and MPS report it only in the message."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, OutOfMemory)):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in words or "out of memory" in words
    )


def with_less(
    ways: Iterable[_Way],
    run: Callable[[_Way], _Made],
    complaint: Callable[[str, Sequence[_Way]], str],
    *,
    release: Callable[[], None] | None = None,
    ran_out: Callable[[Exception], bool] = is_out_of_memory,
) -> tuple[_Made, _Way]:
    """The result of ``run`` for the first of ``ways`` for which memory suffices, and that way.
    ``release`` frees caches of allocators other than CUDA's; ``ran_out`` recognises the errors.
    Raises :class:`OutOfMemory` with ``complaint`` of the last error's text and the ways tried."""
    tried: list[_Way] = []
    message = ""  # not the error itself, whose frames keep tensors alive
    for way in ways:
        try:
            return run(way), way
        except Exception as error:
            if not ran_out(error):
                raise
            tried.append(way)
            message = brief(error)
        gc.collect()  # frames that the error left behind
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if release is not None:
            release()
    raise OutOfMemory(complaint(message, tried))


def halved(rows: int) -> Iterator[int]:
    """``rows``, then half as many, and so on down to one."""
    while rows > 1:
        yield rows
        rows //= 2
    yield 1
