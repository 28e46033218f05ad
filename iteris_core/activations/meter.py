"""How much memory tensors take: what is live while something runs, and what is free."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of tensors made within it that are still alive: ``live`` and ``peak``.

    It sees what PyTorch is asked for, on any device; what an allocator rounds up or keeps is not
    in it, nor what a kernel takes for itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, 0)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._note(tensor, None)
        return result

    def _note(self, tensor: Tensor, size: int | None) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # quantised and other tensors without one
            return
        size = storage.nbytes() if size is None else size
        key = storage._cdata
        known = self._known.get(key)
        if known is not None and known() is not None:
            return

        def freed(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


_KEPT_FREE = 0.1  # of the memory that is free: for what allocators round up and libraries take


def usable(free: int) -> int:
    """The part of ``free`` bytes that a plan may count on."""
    return round((1 - _KEPT_FREE) * free)


def free_memory(device: torch.device) -> int:
    """Bytes that are free, of the device or of the machine; what PyTorch keeps to itself counts."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    import psutil

    return int(psutil.virtual_memory().available)
