"""A model's forward as a function of merged factors, which can be differentiated.

Where memory is short, a block runs without gradients and keeps its arguments. For the backward pass
it runs again, on copies of those that it changes in place, so a step holds the arguments of all
blocks and the activations of one. torch's own checkpoints would do the same, but do not notice when
a block changes a tensor that its gradient needs (``x += attention(norm(x))``), and give a wrong
one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from threading import Lock
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from ..lora import LowRank
from .memory import tensors_in
from .trace import ExecutionTrace, hooked, unwritten

_MUTATION = Lock()
"""torch allows mutation for the whole process, and only once at a time."""
Context = Callable[[], AbstractContextManager[None]]
Filled = Callable[[Iterator[Tensor]], Any]
"""What returns containers with these tensors in them."""


@dataclass
class Network:
    """A ``module`` on a ``device`` with its ``blocks``: each with the arguments that it changes in
    place, as paths in (args, kwargs), and its sites. If it ``replays``, the ``replayable`` ones run
    again for the backward pass; otherwise their activations stay in memory until then."""

    module: nn.Module
    blocks: Mapping[nn.Module, tuple[Set[str], Sequence[str]]]
    device: torch.device
    replayable: Set[nn.Module]
    replays: bool = True

    @classmethod
    def of(cls, trace: ExecutionTrace, written: Mapping[nn.Module, Set[str]]) -> Network:
        """From a forward, and the arguments that its blocks have ``written`` to."""
        blocks = {
            block: (paths, [site for site in trace.sites if block in trace.inside[site]])
            for block, paths in written.items()
        }
        return cls(trace.inside[trace.sites[0]][0], blocks, trace.device, blocks.keys())

    @contextmanager
    def differentiable(
        self,
        factors: Mapping[str, LowRank],
        gradients: Context,
        losing: set[nn.Module] | None = None,
    ) -> Generator[None]:
        """Context in which forwards, within ``gradients()``, can be differentiated with respect to
        ``factors``, merged changes by site. The blocks that lose a gradient, because they read a
        tensor that is none of their arguments, are added to ``losing``."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(gradients())
            stack.enter_context(constant_weights(self.module))
            stack.enter_context(hooked([self.module], before=_ordinary))
            for block in self.replayable:
                written, sites = self.blocks[block]
                changes = [factors[site] for site in sites if site in factors]
                leaves = [leaf for change in changes for leaf in (change.up, change.down)]
                loses = None if losing is None else partial(losing.add, block)
                plain = block.forward
                again = _run_again(plain, written, leaves, gradients, loses)
                again = partial(self._forward, plain, again)
                stack.enter_context(patch.object(block, "forward", again))
            yield

    def _forward(self, plain: Any, again: Any, *args: Any, **kwargs: Any) -> Any:
        replays = self.replays and torch.is_grad_enabled()
        return (again if replays else plain)(*args, **kwargs)


@contextmanager
def saved_tensors(*, mutable: bool) -> Generator[None]:
    """Context for a forward and its backward pass, in which weights may leave the device between
    the two. Tensors that the backward pass needs must not change, unless ``mutable``; then they
    are copied as they do."""
    if mutable:
        with _MUTATION, allow_mutation_on_saved_tensors():
            yield
        return

    def keep(tensor: Tensor) -> tuple[Tensor, int]:
        return tensor.detach(), tensor._version  # which has the storage that a weight has now

    def kept(saved: tuple[Tensor, int]) -> Tensor:
        tensor, version = saved
        if tensor._version != version:
            raise RuntimeError("a tensor needed for gradients was modified by an inplace operation")
        return tensor

    with saved_tensors_hooks(keep, kept):
        yield


def _run_again(
    forward: Callable[..., Any],
    written: Set[str],
    leaves: Sequence[Tensor],
    gradients: Context,
    loses: Callable[[], None] | None,
) -> Callable[..., Any]:
    """A block's ``forward``, which runs again for the gradients of its arguments and of the
    ``leaves``, its factors. It calls ``loses`` if it loses others."""

    def again(*args: Any, **kwargs: Any) -> Any:
        tensors, filled = _taken((args, kwargs))

        def run(arguments: Sequence[Tensor]) -> tuple[list[Tensor], Filled]:
            args, kwargs = unwritten(written, *filled(iter(arguments)))
            return _taken(forward(*args, **kwargs))

        returned: list[Filled] = []
        apply: Any = _Rerun.apply
        how = gradients, loses
        outputs = apply(run, returned, how, len(tensors), *tensors, *leaves)
        return returned[0](iter(outputs))

    return again


def _taken(tree: Any) -> tuple[list[Tensor], Filled]:
    """The tensors in containers, also within dataclasses, and a function that returns the
    containers with others."""
    leaves, spec = _pytree.tree_flatten(tree)
    tensors: list[Tensor] = []
    inner: dict[int, Filled] = {}
    for at, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            leaves[at], inner[at] = None, next
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            of_fields = {field.name: getattr(leaf, field.name) for field in fields(leaf)}
            of_leaf, fill = _taken(of_fields)
            tensors += of_leaf
            inner[at] = partial(_with_fields, leaf, fill)

    def filled(others: Iterator[Tensor]) -> Any:
        parts = [inner[at](others) if at in inner else leaf for at, leaf in enumerate(leaves)]
        return _pytree.tree_unflatten(parts, spec)

    return tensors, filled


def _with_fields(value: Any, fill: Filled, tensors: Iterator[Tensor]) -> Any:
    """A copy of a dataclass, with what ``fill`` makes of ``tensors`` as its fields."""
    again = copy.copy(value)
    for name, field in fill(tensors).items():
        object.__setattr__(again, name, field)
    return again


class _Rerun(torch.autograd.Function):
    """The tensors that ``run`` makes of others, without gradients; then once more for them. What
    fills its containers goes into ``returned``."""

    @staticmethod
    def forward(
        ctx: Any, run: Any, returned: list[Filled], how: Any, count: int, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.how, ctx.leaves = run, how, inputs[count:]
        ctx.save_for_backward(*inputs[:count])
        ctx.set_materialize_grads(False)
        outputs, filled = run(inputs[:count])
        returned.append(filled)
        return tuple(_whole(output, inputs) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *wanted: Tensor | None) -> Any:
        needed, (gradients, loses) = ctx.needs_input_grad[4:], ctx.how
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(gradients())
            arguments = [
                tensor.detach().requires_grad_(needs)
                for tensor, needs in zip(ctx.saved_tensors, needed, strict=False)
            ]
            inputs = [*arguments, *ctx.leaves]
            if loses is not None:
                stack.enter_context(_Captured(inputs, loses))
            outputs, _ = ctx.run(arguments)
            pairs = [
                (output, grad)
                for output, grad in zip(outputs, wanted, strict=True)
                if output.requires_grad and grad is not None
            ]
            outputs, grads = [output for output, _ in pairs], [grad for _, grad in pairs]
            sources = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs]
            found = iter(torch.autograd.grad(outputs, sources, grads, allow_unused=True))
        return None, None, None, None, *(next(found) if needs else None for needs in needed)


def _whole(output: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """An output that may be changed in place outside, which autograd forbids for a view."""
    if not output._is_view():
        return output
    of_inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    shared = output.untyped_storage().data_ptr() in of_inputs
    return output.clone() if shared else _same_storage(output)


class _Captured(TorchFunctionMode):
    """Calls ``found()`` for a tensor with gradients that is none of ``known`` nor made here."""

    def __init__(self, known: Sequence[Tensor], found: Callable[[], None]) -> None:
        super().__init__()
        self._known, self._found = {id(tensor): tensor for tensor in known}, found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_in((args, kwargs)):
            if tensor.requires_grad and id(tensor) not in self._known:
                self._found()
        result = func(*args, **kwargs)
        self._known |= {id(tensor): tensor for tensor in tensors_in(result)}
        return result


@contextmanager
def constant_weights(root: nn.Module) -> Generator[None]:
    """Context in which the weights of ``root`` want no gradients. Those that were loaded in
    inference mode, through which none pass, are replaced by others of the same storage."""
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    wanting: list[tuple[dict[str, Any], str]] = []
    try:
        for module in root.modules():
            stores: list[dict[str, Any]] = [module._parameters, module._buffers]
            for named in stores:
                for name, value in named.items():
                    if value is None:
                        continue
                    if value.is_inference():
                        replaced.append((named, name, value))
                        named[name] = _same_storage(value)
                    elif value.requires_grad and value.is_leaf:
                        wanting.append((named, name))
                        value.requires_grad_(False)
        yield
    finally:
        for named, name, value in replaced:
            named[name] = value
        for named, name in wanting:
            named[name].requires_grad_(True)


def _ordinary(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A pre-hook: arguments that were made in inference mode, as others of the same storage."""
    tensors, filled = _taken((args, kwargs))
    if not any(tensor.is_inference() for tensor in tensors):
        return None
    return filled(_same_storage(of) if of.is_inference() else of for of in tensors)


def _same_storage(value: Tensor) -> Tensor:
    """An inference-mode tensor as one of ordinary mode, of the same kind."""
    if hasattr(value, "__tensor_flatten__"):  # a quantised weight, made of others
        kind: Any = type(value)
        parts, about = value.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        inner = {part: getattr(value, part) for part in parts}
        same = kind.__tensor_unflatten__(inner, about, value.size(), value.stride())
        return nn.Parameter(same, requires_grad=False) if isinstance(value, nn.Parameter) else same
    same = torch.empty(0, dtype=value.dtype, device=value.device)
    with torch.no_grad():
        same.set_(value.untyped_storage(), value.storage_offset(), value.size(), value.stride())
    if type(value) is nn.Parameter:
        return nn.Parameter(same, requires_grad=False)
    if type(value) is not Tensor:
        same = same.as_subclass(type(value))
        for name, attribute in vars(value).items():
            setattr(same, name, attribute)
    return same
