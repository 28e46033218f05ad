"""Puts ComfyUI into the state that a merge needs, and back.

Forwards of a merge pause in layer hooks while others run. ComfyUI's compiler and CUDA graphs record
one forward at a time and bypass the hooks on replay. Prefetching keeps the next block's weights on
the layers, which all forwards share. Fused operations read a layer's weights without calling it.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .comfy_internals import check_switches, comfy, optional, owner_of

_PRECISE = "_full_precision_mm"
"""A flag of ComfyUI's mixed-precision layers: True if they do not quantise their input."""
_PRODUCT = "_forward"
"""Their method that multiplies; :func:`in_full_precision` replaces it."""
_SCALE = "pre_quant_scale"
"""Their factors of their input's channels."""
SWITCHES: Sequence[tuple[str, Any]] = (
    ("comfy.cli_args.args.disable_comfy_compiler", True),
    ("comfy.cli_args.args.disable_cuda_graphs", True),
    ("comfy.model_prefetch.make_prefetch_queue", lambda *_, **__: None),
    ("comfy.model_management.in_training", True),
)
"""Values during a merge, for names that this ComfyUI has."""
_ONE_AT_A_TIME = RLock()
"""These are the whole process's, and so are the models' hooks."""


@contextmanager
def ready_for_merge(clip: Any = None) -> Generator[None]:
    """Context in which a merge can run MODEL and CLIP; previous settings are always restored. A
    merge in another thread waits.
    Tensors have version counters, which reveal sites that share an input, and no gradients. The
    text encoders of ``clip`` are :func:`in_full_precision`. So is the denoiser while its features
    are collected; it draws as usual."""
    check_switches()
    with _ONE_AT_A_TIME, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for path, value in SWITCHES:
            stack.enter_context(switched(path, value))
        if clip is not None:
            stack.enter_context(in_full_precision(clip.cond_stage_model))
            stack.enter_context(observable(clip.cond_stage_model))
        yield


@contextmanager
def switched(path: str, value: Any) -> Generator[None]:
    """Context in which the object at ``path`` is ``value``, if this ComfyUI has it."""
    before = optional(path)
    if before is None:
        yield
        return
    owner, _, name = path.rpartition(".")
    setattr(owner_of(owner), name, value)
    try:
        yield
    finally:
        setattr(owner_of(owner), name, before)


def run_uncompiled(options: dict[str, Any]) -> None:
    """Compiled code does not run layer hooks; the plain module underneath gives the same result."""
    from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

    wrappers = options["transformer_options"].get("wrappers", {})
    for found in (wrappers, options.get("to_load_options", {}).get("wrappers", {})):
        for keyed in found.values():
            keyed.pop(COMPILE_KEY, None)


def forget(network: nn.Module) -> None:
    """Clear caches of ``network`` between forwards: some cache a text's keys and values by its
    tokens alone, regardless of the active LoRA."""
    clear = getattr(network, "clear_kv_cache", None)
    if clear is not None:
        clear()


@contextmanager
def in_full_precision(network: nn.Module) -> Generator[None]:
    """Context in which layers with quantised weights do not quantise their input, as they do on
    some cards, or with int8 weights anywhere. A target is a small difference of two outputs, so
    rounding would dominate it."""
    kind = optional("comfy.quant_ops.QuantizedTensor")
    layers = [] if kind is None else [m for m in network.modules() if hasattr(m, _PRECISE)]
    quantising = [layer for layer in layers if not getattr(layer, _PRECISE)]

    def plain(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.dequantize() if isinstance(weight, kind) else weight
        return nn.functional.linear(inputs, weight, bias)

    for layer in quantising:
        setattr(layer, _PRECISE, True)
    for layer in layers:
        layer.__dict__[_PRODUCT] = plain
    try:
        yield
    finally:
        for layer in quantising:
            setattr(layer, _PRECISE, False)
        for layer in layers:
            layer.__dict__.pop(_PRODUCT, None)


@contextmanager
def observable(network: nn.Module) -> Generator[None]:
    """Context in which hooks see what the weights of ``network`` get, row by row.

    A layer of AWQ scales its input inside its forward; here, before it. ACE-Step 1.5 gives the
    timbres of all rows to the first row; here each row gets its own, as it does alone.
    """
    scales = {m: s for m in network.modules() if (s := getattr(m, _SCALE, None)) is not None}
    timbre = getattr(getattr(network, "encoder", None), "timbre_encoder", None)

    def scaled(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs, *rest = args
        return inputs * scales[layer].to(inputs), *rest

    def own(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        timbres, _order, *rest = args
        return timbres, torch.arange(len(timbres), device=timbres.device), *rest

    handles = [layer.register_forward_pre_hook(scaled) for layer in scales]
    handles += [] if timbre is None else [timbre.register_forward_pre_hook(own)]
    for layer in scales:
        setattr(layer, _SCALE, None)
    try:
        yield
    finally:
        for layer, scale in scales.items():
            setattr(layer, _SCALE, scale)
        for handle in handles:
            handle.remove()


_FUSED = "comfy_kitchen"


@contextmanager
def training() -> Generator[None]:
    """Context in which ComfyUI uses differentiable operations, if it has that mode. Fused
    operations without gradients are replaced by torch's own."""
    with switched("comfy.model_management.in_training", True), _Unfused():
        yield


_OVERRIDE = "optimized_attention_override"
_WITHOUT_GRADIENTS = "sage", "flash"
"""Parts of the names of ComfyUI's attention functions of which no gradient comes back."""


@contextmanager
def differentiable_attention(options: dict[str, Any]) -> Generator[None]:
    """Context in which forwards with these transformer ``options`` use attention with gradients:
    torch's own in place of ComfyUI's that has none, or of another pack's."""

    def attend(chosen: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(chosen, "__name__", "")
        without = any(part in name for part in _WITHOUT_GRADIENTS)
        plain = comfy.ldm.modules.attention.attention_pytorch
        return (plain if without else chosen)(*args, **kwargs)

    before = options.get(_OVERRIDE)
    options[_OVERRIDE] = attend
    try:
        yield
    finally:
        if before is None:
            del options[_OVERRIDE]
        else:
            options[_OVERRIDE] = before


class _Unfused(TorchFunctionMode):
    """Operations with gradients in place of those that have none, with the same result:
    comfy-kitchen's fallback without kernels, and a result that is copied into ``out``."""

    def __init__(self) -> None:
        super().__init__()
        try:
            self._plain: Any = importlib.import_module(f"{_FUSED}.backends.eager")
        except ImportError:  # a ComfyUI without this package
            self._plain = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, rest = getattr(func, "_qualified_op_name", ""), dict(kwargs or {})
        # What only unpacks a quantised weight passes no gradients, and may take other arguments.
        given = (*args, *rest.values())
        if name.startswith(f"{_FUSED}::") and any(getattr(of, "requires_grad", 0) for of in given):
            func = getattr(self._plain, name.partition("::")[2], func)
        if not isinstance(rest.get("out"), torch.Tensor) or not torch.is_grad_enabled():
            return func(*args, **rest)
        return rest.pop("out").copy_(func(*args, **rest))
