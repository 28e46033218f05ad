"""ComfyUI's forwards so that they can be differentiated."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode

from .comfy_state import switched

_FUSED = "comfy_kitchen"


@contextmanager
def training() -> Generator[None]:
    """Within it ComfyUI takes operations that can be differentiated, where it has such a mode, and
    fused ones, which have no formula for their gradients, are made of torch's own."""
    with switched("comfy.model_management.in_training", True), _Unfused():
        yield


class _Unfused(TorchFunctionMode):
    """Operations of comfy-kitchen by what it has for machines without a kernel, which is written in
    torch's own operations and gives the same."""

    def __init__(self) -> None:
        super().__init__()
        try:
            self._plain: Any = importlib.import_module(f"{_FUSED}.backends.eager")
        except ImportError:  # of a ComfyUI that has no such package
            self._plain = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "_qualified_op_name", "")
        if name.startswith(f"{_FUSED}::"):
            func = getattr(self._plain, name.partition("::")[2], func)
        return func(*args, **(kwargs or {}))
