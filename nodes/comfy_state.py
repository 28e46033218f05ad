"""ComfyUI in the state that a merge needs, and back.

Forwards of a merge pause in hooks of the layers while others run. ComfyUI's compiler and CUDA
graphs record one forward at a time and replay it past the hooks; prefetching keeps the weights of
the next block on the layers, which all forwards share; fused operations read a layer's weights
without calling it.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..iteris_core.activations.host_pool import pinning_at_most
from .comfy_internals import optional, set_optional


def _no_queue(*_: Any, **__: Any) -> None:
    """Weights come when a layer is called."""


_PRECISE = "_full_precision_mm"
"""A flag of ComfyUI's layers of mixed precision: True if they leave their input as it is."""
SWITCHES: Sequence[tuple[str, Any]] = (
    ("comfy.cli_args.args.disable_comfy_compiler", True),
    ("comfy.cli_args.args.disable_cuda_graphs", True),
    ("comfy.model_prefetch.make_prefetch_queue", _no_queue),
    ("comfy.model_management.in_training", True),
)
"""The values during a merge, of names that this ComfyUI has."""


@contextmanager
def ready_for_merge(clip: Any = None) -> Generator[None]:
    """Within it MODEL and CLIP can be run by a merge; what was set before is put back, whatever
    happens. Tensors have versions, by which sites that share an input are found, and no
    gradients. The text encoders of ``clip`` are :func:`in_full_precision`; the denoiser is while
    its features are collected, and draws as always."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for path, value in SWITCHES:
            stack.enter_context(switched(path, value))
        stack.enter_context(pinning_at_most(_pinnable()))
        if clip is not None:
            stack.enter_context(in_full_precision(clip.cond_stage_model))
        yield


@contextmanager
def switched(path: str, value: Any) -> Generator[None]:
    """Within it what ``path`` names is ``value``, where this ComfyUI has it."""
    before = optional(path)
    if before is None:
        yield
        return
    set_optional(path, value)
    try:
        yield
    finally:
        set_optional(path, before)


def forget(network: nn.Module) -> None:
    """Empty what ``network`` keeps of one forward for the next: some keep the keys and values of a
    text, by its tokens alone, whatever LoRA they were made with."""
    clear = getattr(network, "clear_kv_cache", None)
    if clear is not None:
        clear()


@contextmanager
def in_full_precision(network: nn.Module) -> Generator[None]:
    """Within it layers with quantised weights take their input as it is. On some cards they
    quantise it as well: a target is a small difference of two outputs, and would be of what that
    rounds."""
    quantising = [m for m in network.modules() if getattr(m, _PRECISE, True) is False]
    for layer in quantising:
        setattr(layer, _PRECISE, True)
    try:
        yield
    finally:
        for layer in quantising:
            setattr(layer, _PRECISE, False)


def _pinnable() -> int | None:
    """Bytes of host memory that may be pinned beside what ComfyUI has pinned; None: it does not
    say. It pins none where it was started without."""
    most = optional("comfy.model_management.MAX_PINNED_MEMORY")
    taken = optional("comfy.model_management.TOTAL_PINNED_MEMORY")
    if most is None or taken is None:
        return None
    return max(int(most) - int(taken), 0)


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
